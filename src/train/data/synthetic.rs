//! Generated text for `--synthetic`: little stories with something to learn at every range: spelling, grammar that
//! agrees in number and gender, and names, things and sums that come back later in a story.

use super::{DataError, DataSpec, Format, TokenizerSpec};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::json;
use std::fs;
use std::path::Path;

const PEOPLE: [(&str, &str, &str); 10] = [
    ("Ada", "She", "her"),
    ("Ben", "He", "his"),
    ("Clara", "She", "her"),
    ("Dan", "He", "his"),
    ("Emma", "She", "her"),
    ("Felix", "He", "his"),
    ("Greta", "She", "her"),
    ("Hugo", "He", "his"),
    ("Iris", "She", "her"),
    ("Jonas", "He", "his"),
];
const THINGS: [&str; 10] = ["ball", "kite", "boat", "lamp", "drum", "hat", "spoon", "stone", "basket", "bell"];
const COLOURS: [&str; 8] = ["red", "blue", "green", "yellow", "white", "black", "silver", "brown"];
const PLACES: [&str; 8] = ["garden", "market", "river", "forest", "school", "harbour", "mill", "bridge"];
const MOODS: [(&str, &str); 6] = [
    ("happy", "laughed"),
    ("sad", "cried"),
    ("tired", "yawned"),
    ("proud", "smiled"),
    ("cold", "shivered"),
    ("angry", "shouted"),
];
const NUMBERS: [&str; 9] = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"];

/// Writes `documents` generated stories to a file in `dir`, in the form that `spec` reads, and returns `spec` with that
/// file for its data and a twentieth of it for validation. A tokenizer file that is not there is replaced by BPE of 1024
/// tokens. Equal arguments make equal text.
///
/// # Errors
/// A folder that cannot be written to.
pub fn synthetic(spec: &DataSpec, dir: &Path, documents: usize, seed: u64) -> Result<DataSpec, DataError> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let separator = spec.separator.clone().unwrap_or_default();
    let mut text = String::new();
    for _ in 0..documents {
        let story = story(&mut rng);
        match spec.format {
            Format::Text => text.extend([&story, "\n", &separator, "\n"]),
            Format::Lines => text.extend([&story, "\n"]),
            Format::Jsonl => text.extend([json!({spec.field.as_str(): story}).to_string().as_str(), "\n"]),
        }
    }
    fs::create_dir_all(dir).map_err(DataError::io(dir))?;
    let extension = if spec.format == Format::Jsonl { "jsonl" } else { "txt" };
    let path = dir.join(format!("synthetic-{seed}-{documents}.{extension}"));
    fs::write(&path, text).map_err(DataError::io(&path))?;
    let tokenizer = match &spec.tokenizer {
        TokenizerSpec::File(file) if !file.exists() => TokenizerSpec::Bpe(1024),
        given => given.clone(),
    };
    let eos = if matches!(tokenizer, TokenizerSpec::File(_)) { spec.eos.clone() } else { None };
    Ok(DataSpec { train: vec![path], valid: Vec::new(), valid_share: 0.05, tokenizer, eos, ..spec.clone() })
}

fn story(rng: &mut ChaCha8Rng) -> String {
    let (name, pronoun, possessive) = *pick(rng, &PEOPLE);
    let friend = loop {
        let (other, ..) = *pick(rng, &PEOPLE);
        if other != name {
            break other;
        }
    };
    let (thing, colour, place) = (*pick(rng, &THINGS), *pick(rng, &COLOURS), *pick(rng, &PLACES));
    let (mood, did) = *pick(rng, &MOODS);
    let mut text = match rng.next_u32() % 3 {
        0 => format!("{name} had a {colour} {thing}. "),
        1 => format!("Once there was a {colour} {thing}, and it was {name}'s. "),
        _ => format!("One day {name} found a {colour} {thing} at the {place}. "),
    };
    match rng.next_u32() % 3 {
        0 => text += &format!("{pronoun} took the {thing} to the {place} and met {friend} there. "),
        1 => text += &format!("At the {place}, {friend} asked about the {thing}. "),
        _ => text += &format!("{pronoun} went to the {place} with {friend}. "),
    }
    if rng.next_u32().is_multiple_of(2) {
        let (mine, yours) = (rng.next_u32() as usize % 4 + 1, rng.next_u32() as usize % 4 + 1);
        let (has, have, all) = (NUMBERS[mine - 1], NUMBERS[yours - 1], NUMBERS[mine + yours - 1]);
        let counted = |n: usize| if n == 1 { "apple" } else { "apples" };
        text += &format!(
            "{name} had {has} {} and {friend} had {have} {}, so together they had {all} apples. ",
            counted(mine),
            counted(yours)
        );
    }
    text += &format!("{name} was {mood} and {did}. ");
    text + &match rng.next_u32() % 3 {
        0 => {
            format!("\"Is this your {thing}?\" asked {friend}. \"Yes,\" said {name}, \"the {colour} {thing} is mine.\"")
        }
        1 => format!("Then {friend} gave {name} back {possessive} {colour} {thing}, and they left the {place}."),
        _ => format!("In the evening {name} put {possessive} {colour} {thing} away and thought of {friend}."),
    }
}

fn pick<'a, T>(rng: &mut ChaCha8Rng, from: &'a [T]) -> &'a T {
    &from[rng.next_u32() as usize % from.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_has_its_text_and_stories_hang_together() {
        let told = |seed| story(&mut ChaCha8Rng::seed_from_u64(seed));
        assert_eq!(told(3), told(3));
        let distinct: std::collections::HashSet<String> = (0..1000).map(told).collect();
        assert!(distinct.len() > 990, "{}", distinct.len());
        for text in distinct {
            assert!(text.is_ascii() && !text.contains('\n') && text.ends_with(['.', '"']), "{text}");
            let colours = COLOURS.iter().filter(|colour| text.contains(&format!(" {colour} "))).count();
            assert_eq!(colours, 1, "the thing keeps its colour: {text}");
        }
    }
}
