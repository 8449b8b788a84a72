//! MMLU, four choices each: lm-eval's group `mmlu`.
//!
//! Hendrycks et al., "Measuring Massive Multitask Language Understanding", ICLR 2021.

use super::extract::strip;
use super::formats::{Columns, Rows, csv, parquet};
use super::source::{DataError, HubFile, Split};
use super::{Answer, Ask, Judged, LoadOptions, Loaded, Sample, Source, Subtask, TaskEntry};
use std::path::Path;

pub(super) const TASK: TaskEntry = TaskEntry {
    name: "mmlu",
    summary: "MMLU: knowledge of 57 subjects, the likeliest of four letters (14,042 samples)",
    version: "1.0",
    shots: 0,
    shots_allowed: 0..=5,
    metrics: &["acc"],
    subtasks,
    read,
    judge,
};

const GROUPS: [(&str, &[&str]); 4] = [
    (
        "mmlu_stem",
        &[
            "abstract_algebra",
            "anatomy",
            "astronomy",
            "college_biology",
            "college_chemistry",
            "college_computer_science",
            "college_mathematics",
            "college_physics",
            "computer_security",
            "conceptual_physics",
            "electrical_engineering",
            "elementary_mathematics",
            "high_school_biology",
            "high_school_chemistry",
            "high_school_computer_science",
            "high_school_mathematics",
            "high_school_physics",
            "high_school_statistics",
            "machine_learning",
        ],
    ),
    (
        "mmlu_humanities",
        &[
            "formal_logic",
            "high_school_european_history",
            "high_school_us_history",
            "high_school_world_history",
            "international_law",
            "jurisprudence",
            "logical_fallacies",
            "moral_disputes",
            "moral_scenarios",
            "philosophy",
            "prehistory",
            "professional_law",
            "world_religions",
        ],
    ),
    (
        "mmlu_social_sciences",
        &[
            "econometrics",
            "high_school_geography",
            "high_school_government_and_politics",
            "high_school_macroeconomics",
            "high_school_microeconomics",
            "high_school_psychology",
            "human_sexuality",
            "professional_psychology",
            "public_relations",
            "security_studies",
            "sociology",
            "us_foreign_policy",
        ],
    ),
    (
        "mmlu_other",
        &[
            "business_ethics",
            "clinical_knowledge",
            "college_medicine",
            "global_facts",
            "human_aging",
            "management",
            "marketing",
            "medical_genetics",
            "miscellaneous",
            "nutrition",
            "professional_accounting",
            "professional_medicine",
            "virology",
        ],
    ),
];

const LETTERS: [&str; 4] = ["A", "B", "C", "D"];

fn subtasks() -> Vec<Subtask> {
    let of_group = |(group, keys): (&'static str, &'static [&'static str])| {
        keys.iter().map(move |key| Subtask { name: format!("mmlu_{key}"), key, group: Some(group) })
    };
    GROUPS.into_iter().flat_map(of_group).collect()
}

fn read(source: &Source, subtask: &Subtask, options: &LoadOptions) -> Result<Loaded, DataError> {
    let subject = subtask.key.replace('_', " ");
    let mut prefix = format!("The following are multiple choice questions (with answers) about {subject}.\n\n");
    let (rows, test) = source.read(split(subtask.key, "test"))?;
    let mut data = vec![test];
    if options.shots > 0 {
        let (shots, dev) = source.read(split(subtask.key, "dev"))?;
        options.check_shots(&subtask.name, shots.len())?;
        for row in &shots[..options.shots] {
            prefix += &format!("{} {}\n\n", text(row), row[5]);
        }
        data.push(dev);
    }
    let sample = |(index, row): (usize, [String; 6])| Sample {
        index,
        prompt: format!("{prefix}{}", text(&row)),
        ask: Ask::Choose {
            continuations: LETTERS.iter().map(|letter| format!(" {letter}")).collect(),
            right: LETTERS.iter().position(|letter| *letter == row[5]).unwrap_or_default(),
        },
        reference: row[5].clone(),
    };
    let samples = rows.into_iter().take(options.rows()).enumerate().map(sample).collect();
    Ok(Loaded { samples, data })
}

/// A row is a question, its four choices and the letter of the right one.
fn text([question, a, b, c, d, _]: &[String; 6]) -> String {
    format!("{}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:", strip(question))
}

fn split(subject: &str, split: &str) -> Split<6> {
    Split {
        name: format!("mmlu/{subject}/{split}"),
        file: format!("mmlu/{split}/{subject}_{split}.csv"),
        parse: read_csv,
        hub: Some(HubFile {
            dataset: "cais/mmlu",
            file: format!("{subject}/{split}-00000-of-00001.parquet"),
            parse: Box::new(|path| parquet(path, of_columns)),
        }),
        upstream: "github.com/hendrycks/test",
    }
}

fn read_csv(path: &Path) -> Result<Rows<6>, DataError> {
    let rows: Rows<6> = csv(path)?;
    match rows.iter().position(|row| !LETTERS.contains(&row[5].as_str())) {
        Some(i) => Err(DataError::row(path, i, format!("the answer is {:?}, not one of A, B, C and D", rows[i][5]))),
        None => Ok(rows),
    }
}

fn of_columns(columns: &Columns<'_>) -> Result<[String; 6], String> {
    let [a, b, c, d] = columns.texts("choices")?;
    let answer = columns.integer("answer")?;
    let letter = usize::try_from(answer).ok().and_then(|i| LETTERS.get(i));
    let letter = letter.ok_or_else(|| format!("the answer is {answer}, not one of 0 to 3"))?;
    Ok([columns.text("question")?, a, b, c, d, letter.to_string()])
}

fn judge(sample: &Sample, answer: &Answer) -> Vec<Judged> {
    let prediction = match answer {
        Answer::Choice(choice) => LETTERS.get(*choice).copied().unwrap_or_default().to_string(),
        Answer::Text(text) => text.clone(),
    };
    vec![Judged { correct: prediction == sample.reference, prediction }]
}
