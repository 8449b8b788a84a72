//! What is measured, as asked for.

use super::BenchError;
use crate::moe::router::{ROUTERS, find, sweep};
use crate::types::{RouterSpec, SpecError};
use std::fmt;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Tokens of the prompts; 0 is none.
    pub prompts: Vec<usize>,
    /// Tokens that every sequence generates; 0 for no decoding.
    pub generate: usize,
    /// Sequences that decode at the same time.
    pub batches: Vec<usize>,
    /// Tokens of every sequence that are in the KV cache before it decodes.
    pub context: usize,
    pub routers: Vec<RouterSpec>,
    /// Runs that count, of every test and router.
    pub repeat: usize,
    pub seed: u64,
    /// Whether the machine is measured too.
    pub roofline: bool,
}

/// One line of the table, for every router.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Test {
    /// One sequence in one step.
    Prefill { prompt: usize },
    /// As many steps as tokens are generated.
    Decode { generate: usize, batch: usize },
}

impl fmt::Display for Test {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Prefill { prompt } => write!(f, "pp{prompt}"),
            Self::Decode { generate, batch } => write!(f, "tg{generate}@b{batch}"),
        }
    }
}

impl Test {
    /// Tokens that one run computes.
    pub(super) fn tokens(self) -> usize {
        match self {
            Self::Prefill { prompt } => prompt,
            Self::Decode { generate, batch } => generate * batch,
        }
    }
}

impl Settings {
    /// The tests in order: prompts first.
    ///
    /// # Errors
    /// None at all.
    pub(super) fn tests(&self) -> Result<Vec<Test>, BenchError> {
        let prefill = self.prompts.iter().filter(|n| **n > 0).map(|&prompt| Test::Prefill { prompt });
        let generate = self.generate;
        let decode = self.batches.iter().filter(|_| generate > 0).map(|&batch| Test::Decode { generate, batch });
        let tests: Vec<Test> = prefill.chain(decode).collect();
        if tests.is_empty() { Err(BenchError::Nothing) } else { Ok(tests) }
    }

    /// The longest prompt.
    pub(super) fn prompt_max(&self) -> usize {
        self.prompts.iter().copied().max().unwrap_or(0)
    }

    /// Positions of a sequence that decodes.
    pub(super) fn decode_positions(&self) -> usize {
        if self.generate == 0 { 0 } else { self.context + self.generate }
    }
}

/// The routers of a list such as `native,dynk:0.8,mass=full,topk:4`, where a comma also stands within a router: what begins
/// with a router's name, or with a name and a colon, is another one.
///
/// # Errors
/// An empty list, a name that no router has, or a specification that cannot be read.
pub fn routers(list: &str) -> Result<Vec<RouterSpec>, SpecError> {
    let mut texts: Vec<String> = Vec::new();
    for part in list.split(',') {
        match texts.last_mut() {
            Some(text) if !begins_router(part) => {
                text.push(',');
                text.push_str(part);
            }
            _ => texts.push(part.into()),
        }
    }
    let mut specs = Vec::new();
    for text in texts {
        let spec: RouterSpec = text.parse()?;
        find(&spec)?;
        specs.extend(sweep(&spec)?);
    }
    Ok(specs)
}

fn begins_router(part: &str) -> bool {
    let word = part.trim().split(':').next().unwrap_or_default();
    let is_name = !word.is_empty() && word.chars().all(|c| c.is_ascii_alphabetic() || c == '-');
    (is_name && part.contains(':')) || ROUTERS.iter().any(|router| router.name == word)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_comma_parts_routers_or_stands_within_one() {
        for (list, wanted) in [
            ("native", &["native"][..]),
            ("native,topk:4,dynk:0.8", &["native", "topk:4", "dynk:0.8"]),
            ("dynk:0.8,mass=full,min=1,native,weights=keep", &["dynk:0.8,mass=full,min=1", "native,weights=keep"]),
            ("layers:1,2,topk:1", &["layers:1,2", "topk:1"]),
            ("topk:1,2,native", &["topk:1", "topk:2", "native"]),
            (
                "complexity:gradient-norm:entropy, complexity:hidden-norm",
                &["complexity:gradient-norm:entropy", "complexity:hidden-norm"],
            ),
            ("policy:a.json,at=0.5,policy:b.json", &["policy:a.json,at=0.5", "policy:b.json"]),
        ] {
            let specs: Vec<String> = routers(list).unwrap().iter().map(RouterSpec::to_string).collect();
            assert_eq!(specs, wanted, "{list}");
        }
    }

    #[test]
    fn lists_that_name_no_router_are_refused() {
        for (list, reason) in [
            ("", "no router name"),
            ("native,", "empty"),
            ("native,tpok:1", "there is no such router"),
            ("best", "there is no such router"),
        ] {
            let error = routers(list).unwrap_err().to_string();
            assert!(error.contains(reason), "{list}: {error}");
        }
    }

    #[test]
    fn tests_are_those_that_were_not_left_out() {
        let settings = Settings {
            prompts: vec![0, 8],
            generate: 3,
            batches: vec![1, 4],
            context: 5,
            routers: Vec::new(),
            repeat: 1,
            seed: 0,
            roofline: false,
        };
        let names = |s: &Settings| s.tests().unwrap().iter().map(Test::to_string).collect::<Vec<_>>();
        assert_eq!(names(&settings), ["pp8", "tg3@b1", "tg3@b4"]);
        assert_eq!((settings.prompt_max(), settings.decode_positions()), (8, 8));
        let no_decoding = Settings { generate: 0, ..settings };
        assert_eq!((names(&no_decoding), no_decoding.decode_positions()), (vec!["pp8".to_string()], 0));
        let nothing = Settings { prompts: vec![0], ..no_decoding };
        assert!(matches!(nothing.tests(), Err(BenchError::Nothing)));
    }
}
