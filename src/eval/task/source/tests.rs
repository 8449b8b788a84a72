use super::*;
use crate::eval::task::formats::json_lines;
use std::fs;
use tempfile::TempDir;

/// The published rows of a split cannot be here: these are other ones.
const OTHER: &str = "{\"question\":\"1+1?\",\"answer\":\"#### 2\"}\n";

fn split() -> Split<2> {
    Split {
        name: "gsm8k/test".into(),
        file: "gsm8k/test.jsonl".into(),
        parse: |path| json_lines(path, ["question", "answer"]),
        hub: None,
        upstream: "the publisher",
    }
}

fn directory(file: &str, text: &str) -> (TempDir, Source) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(file);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(path, text).unwrap();
    let place = Place::Directory(dir.path().to_path_buf());
    (dir, Source { place, unverified: false, bars: MultiProgress::new() })
}

fn refusal(source: &Source, split: Split<2>) -> String {
    source.read(split).unwrap_err().to_string()
}

#[test]
fn the_sum_is_that_of_netstrings() {
    // printf '1:a,2:é,\n0:,3:b,c,\n' | sha256sum
    let rows = [["a", "é"], ["", "b,c"]].map(|row| row.map(String::from));
    assert_eq!(sum(&rows), "0d5c90c8135fc15b14e19b0f8fb247c073bfcc65ad2203725c09ee03e8cc85b4");
    assert_ne!(sum(&rows), sum(&[["aé", ""], ["", "b,c"]].map(|row| row.map(String::from))));
}

#[test]
fn other_rows_are_refused_with_count_or_sum_and_taken_when_asked() {
    let (_dir, mut source) = directory("gsm8k/test.jsonl", OTHER);
    let error = refusal(&source, split());
    for want in ["gsm8k/test: ", "test.jsonl has 1 rows, the published data 1319", "the publisher", "--unverified"] {
        assert!(error.contains(want), "{error}");
    }
    let (_dir, same_count) = directory("gsm8k/test.jsonl", &OTHER.repeat(1319));
    let error = refusal(&same_count, split());
    assert!(error.contains("have SHA-256 ") && error.contains(published("gsm8k/test").unwrap().1), "{error}");
    source.unverified = true;
    let (rows, facts) = source.read(split()).unwrap();
    assert_eq!((rows.len(), facts.rows, facts.verified), (1, 1, Some(false)));
    assert_eq!(facts.sha256, sum(&rows));
}

#[test]
fn a_split_without_rows_is_refused_even_if_unverified() {
    let (_dir, mut source) = directory("gsm8k/test.jsonl", "\n");
    source.unverified = true;
    assert!(refusal(&source, split()).contains("has no rows"));
}

#[test]
fn the_folder_of_one_benchmark_is_a_data_directory() {
    let (_dir, mut source) = directory("test.jsonl", OTHER);
    source.unverified = true;
    assert_eq!(source.read(split()).unwrap().0.len(), 1);
}

#[test]
fn missing_files_and_directories_are_named_with_where_they_come_from() {
    let (dir, mut source) = directory("x", "");
    let error = refusal(&source, split());
    for want in ["gsm8k/test: ", "has no gsm8k/test.jsonl (nor test.jsonl", "comes from the publisher"] {
        assert!(error.contains(want), "{error}");
    }
    source.place = Place::Directory(dir.path().join("none"));
    assert!(refusal(&source, split()).ends_with("none is not a directory"));
}

#[test]
fn what_the_hub_does_not_have_needs_a_directory() {
    let (_dir, mut source) = directory("x", "");
    source.place = Place::Hub(HubOptions::default());
    let error = refusal(&source, split());
    assert!(error.contains("not on the hub; give a directory with gsm8k/test.jsonl by --data-dir"), "{error}");
}

#[test]
fn files_of_the_hub_are_taken_from_its_cache_when_offline() {
    let (dir, mut source) = directory("datasets--acme--sums/snapshots/a0/main/rows.jsonl", OTHER);
    fs::create_dir_all(dir.path().join("datasets--acme--sums/refs")).unwrap();
    fs::write(dir.path().join("datasets--acme--sums/refs/main"), "a0").unwrap();
    // The revision is the model's.
    let revision = Some("of-the-model".into());
    let cache = Some(dir.path().to_path_buf());
    source.place = Place::Hub(HubOptions { revision, offline: true, cache, ..Default::default() });
    source.unverified = true;
    let of = |file: &str| {
        let hub = HubFile { dataset: "acme/sums", file: file.into(), parse: Box::new(split().parse) };
        Split { hub: Some(hub), ..split() }
    };
    assert_eq!(source.read(of("main/rows.jsonl")).unwrap().0[0][0], "1+1?");
    let error = refusal(&source, of("main/none.jsonl"));
    assert!(error.contains("main/none.jsonl of the data set acme/sums is not in the cache"), "{error}");
}

#[test]
fn the_table_of_sums_is_in_order() {
    let names: Vec<&str> = SUMS.lines().map(|line| line.split(' ').next().unwrap()).collect();
    assert!(names.is_sorted_by(|a, b| a < b));
    for (line, name) in SUMS.lines().zip(names) {
        let (rows, sum) = published(name).unwrap();
        assert!(rows > 0 && sum.len() == 64, "{line}");
    }
}
