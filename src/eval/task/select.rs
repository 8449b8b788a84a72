//! Tasks and subtasks by what users type.

use super::{Subtask, TASKS, TaskEntry};

/// A task and those of its subtasks that were chosen.
pub struct Selected {
    pub task: &'static TaskEntry,
    pub subtasks: Vec<Subtask>,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "there is no task `{asked}`{guess}; tasks are {}, and `moe-eval list` shows their groups and subtasks",
    names().join(", ")
)]
pub struct UnknownTask {
    asked: String,
    /// ` (did you mean …?)`, or nothing.
    guess: String,
}

fn names() -> Vec<&'static str> {
    TASKS.iter().map(|task| task.name).collect()
}

/// Finds tasks (`mmlu`), groups (`mmlu_stem`), subtasks (`mmlu_anatomy`) and subtasks by the names of their data
/// (`anatomy`, if only one task has it). A task stands where it was first named, with its subtasks in their own order.
///
/// # Errors
/// A name that is none of these, or of more than one task's data.
pub fn select(asked: &[String]) -> Result<Vec<Selected>, UnknownTask> {
    let mut chosen: Vec<Selected> = Vec::new();
    for name in asked {
        let found = find(name)?;
        match chosen.iter_mut().find(|selected| selected.task.name == found.task.name) {
            Some(selected) => {
                let both = |subtask: &Subtask| selected.subtasks.contains(subtask) || found.subtasks.contains(subtask);
                selected.subtasks = (found.task.subtasks)().into_iter().filter(both).collect();
            }
            None => chosen.push(found),
        }
    }
    Ok(chosen)
}

fn find(name: &str) -> Result<Selected, UnknownTask> {
    let matching = |wanted: &dyn Fn(&TaskEntry, &Subtask) -> bool| -> Vec<Selected> {
        let of_task = |task: &'static TaskEntry| {
            let subtasks = (task.subtasks)().into_iter().filter(|subtask| wanted(task, subtask)).collect();
            Selected { task, subtasks }
        };
        TASKS.iter().map(of_task).filter(|selected| !selected.subtasks.is_empty()).collect()
    };
    let mut found = matching(&|task, subtask| task.name == name || subtask.name == name || subtask.group == Some(name));
    if found.is_empty() {
        found = matching(&|_, subtask| subtask.key == name);
    }
    match (found.pop(), found.is_empty()) {
        (Some(selected), true) => Ok(selected),
        (Some(_), false) => {
            Err(UnknownTask { asked: name.into(), guess: " of one benchmark alone (give its full name)".into() })
        }
        (None, _) => {
            let guess = nearest(name).map_or(String::new(), |near| format!(" (did you mean `{near}`?)"));
            Err(UnknownTask { asked: name.into(), guess })
        }
    }
}

/// The name that fewest edits lead to, if it is near.
fn nearest(name: &str) -> Option<String> {
    let of_subtask =
        |subtask: Subtask| [subtask.name, subtask.key.into()].into_iter().chain(subtask.group.map(String::from));
    let of_task = |task: &TaskEntry| (task.subtasks)().into_iter().flat_map(of_subtask).chain([task.name.into()]);
    let known = TASKS.iter().flat_map(of_task);
    let near = known.map(|known| (edits(name, &known), known)).min()?;
    Some(near).filter(|(edits, known)| *edits <= (known.len() / 3).max(2)).map(|(_, known)| known)
}

/// Levenshtein's distance in bytes.
fn edits(a: &str, b: &str) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.bytes().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.bytes().enumerate() {
            let replaced = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn selected(names: &[&str]) -> Result<Vec<(&'static str, usize)>, String> {
        let names: Vec<String> = names.iter().map(|name| name.to_string()).collect();
        let found = select(&names).map_err(|e| e.to_string())?;
        Ok(found.iter().map(|selected| (selected.task.name, selected.subtasks.len())).collect())
    }

    #[test]
    fn tasks_groups_subtasks_and_their_keys_are_found() {
        for (names, want) in [
            (&["bbh"][..], &[("bbh", 27)][..]),
            (&["mmlu"], &[("mmlu", 57)]),
            (&["mmlu_stem"], &[("mmlu", 19)]),
            (&["mmlu_humanities"], &[("mmlu", 13)]),
            (&["mmlu_social_sciences"], &[("mmlu", 12)]),
            (&["mmlu_other"], &[("mmlu", 13)]),
            (&["mmlu_anatomy"], &[("mmlu", 1)]),
            (&["anatomy"], &[("mmlu", 1)]),
            (&["bbh_cot_fewshot_snarks", "snarks"], &[("bbh", 1)]),
            (&["gsm8k", "gsm8k_cot"], &[("gsm8k", 1), ("gsm8k_cot", 1)]),
            (&["virology", "gsm8k", "mmlu_stem", "anatomy"], &[("mmlu", 20), ("gsm8k", 1)]),
            (&[], &[]),
        ] {
            assert_eq!(selected(names).unwrap(), want, "{names:?}");
        }
    }

    #[test]
    fn subtasks_keep_the_order_of_their_task() {
        let names = ["snarks", "hyperbaton", "navigate"].map(String::from);
        let found = select(&names).unwrap();
        assert_eq!(found[0].subtasks.iter().map(|s| s.key).collect::<Vec<_>>(), ["hyperbaton", "navigate", "snarks"]);
    }

    #[test]
    fn unknown_names_are_refused_with_the_nearest_one() {
        for (name, guess) in [
            ("mmlu_stems", "did you mean `mmlu_stem`?"),
            ("mmlu_anatom", "did you mean `mmlu_anatomy`?"),
            ("snark", "did you mean `snarks`?"),
            ("gsm8", "did you mean `gsm8k`?"),
            ("MMLU", "tasks are bbh, mmlu, gsm8k, gsm8k_cot, and `moe-eval list` shows"),
            ("hellaswag", "there is no task `hellaswag`; tasks are"),
            ("", "there is no task ``; tasks are"),
        ] {
            let error = selected(&[name]).unwrap_err();
            assert!(error.contains(guess), "{error}");
        }
    }

    #[test]
    fn every_name_means_one_thing() {
        for task in TASKS {
            for subtask in (task.subtasks)() {
                for name in [&subtask.name, subtask.key] {
                    assert_eq!(selected(&[name]).unwrap(), [(task.name, 1)], "{name}");
                }
            }
        }
    }

    #[test]
    fn edits_are_counted() {
        for (a, b, want) in [("", "", 0), ("abc", "abc", 0), ("abc", "", 3), ("kitten", "sitting", 3), ("ab", "ba", 2)]
        {
            assert_eq!(edits(a, b), want, "{a} {b}");
            assert_eq!(edits(b, a), want, "{b} {a}");
        }
    }
}
