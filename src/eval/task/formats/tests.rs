use super::*;
use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType, DataType, Int64Type};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::{SerializedFileWriter, SerializedRowGroupWriter};
use parquet::schema::parser::parse_message_type;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use tempfile::TempDir;

fn file(name: &str, text: &str) -> (TempDir, PathBuf) {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join(name);
    fs::write(&path, text).unwrap();
    (dir, path)
}

fn write_column<D: DataType>(
    group: &mut SerializedRowGroupWriter<'_, File>,
    values: &[D::T],
    (definition, repetition): (&[i16], Option<&[i16]>),
) {
    let mut column = group.next_column().unwrap().unwrap();
    column.typed::<D>().write_batch(values, Some(definition), repetition).unwrap();
    column.close().unwrap();
}

/// Writes a file of text columns and, of MMLU, the list of choices and the number of the answer; as the hub has them:
/// all optional, in Snappy. Rows of two have these `columns`, rows of six are those of MMLU.
pub(in crate::eval::task) fn write_parquet(path: &Path, columns: [&str; 2], rows: &[Vec<String>]) {
    let mmlu = rows[0].len() == 6;
    let [first, second] = columns;
    let more = "optional group choices (LIST) { repeated group list { optional binary element (UTF8); } }
        optional int64 answer;";
    let schema = format!(
        "message schema {{ optional binary {first} (UTF8); optional binary {second} (UTF8); {} }}",
        if mmlu { more } else { "" }
    );
    let properties = WriterProperties::builder().set_compression(Compression::SNAPPY).build();
    let schema = Arc::new(parse_message_type(&schema).unwrap());
    let mut writer = SerializedFileWriter::new(File::create(path).unwrap(), schema, Arc::new(properties)).unwrap();
    // Two rows a group, so that rows come from several.
    for rows in rows.chunks(2) {
        let mut group = writer.next_row_group().unwrap();
        let texts = |i: usize| rows.iter().map(|row| ByteArray::from(row[i].as_str())).collect::<Vec<_>>();
        let present = vec![1; rows.len()];
        // The second column is the subject, which nobody reads, or the answer.
        write_column::<ByteArrayType>(&mut group, &texts(0), (&present, None));
        write_column::<ByteArrayType>(&mut group, &texts(1), (&present, None));
        if mmlu {
            let choices: Vec<_> = rows.iter().flat_map(|row| &row[1..5]).map(|c| ByteArray::from(c.as_str())).collect();
            let repetition: Vec<i16> = (0..choices.len()).map(|i| i16::from(i % 4 > 0)).collect();
            write_column::<ByteArrayType>(&mut group, &choices, (&vec![3; choices.len()], Some(&repetition)));
            let answers: Vec<i64> = rows.iter().map(|row| i64::from(row[5].as_bytes()[0] - b'A')).collect();
            write_column::<Int64Type>(&mut group, &answers, (&present, None));
        }
        group.close().unwrap();
    }
    writer.close().unwrap();
}

fn mmlu_row(columns: &Columns<'_>) -> Result<[String; 6], String> {
    let [a, b, c, d] = columns.texts("choices")?;
    let letter = ["A", "B", "C", "D"][columns.integer("answer")? as usize].to_string();
    Ok([columns.text("question")?, a, b, c, d, letter])
}

#[test]
fn rows_of_parquet_are_those_of_csv() {
    let csv_text =
        "\"Who said \"\"moo\"\", and why?\nThink.\",the cow,the cat,\" the, hen\",,A\n plain ,1,2,3,4,D\nñ,x,y,z,é,B\n";
    let (dir, path) = file("rows.csv", csv_text);
    let rows: Rows<6> = csv(&path).unwrap();
    assert_eq!(rows[0][..4], ["Who said \"moo\", and why?\nThink.", "the cow", "the cat", " the, hen"]);
    let parquet_path = dir.path().join("rows.parquet");
    write_parquet(&parquet_path, ["question", "subject"], &rows.iter().map(|row| row.to_vec()).collect::<Vec<_>>());
    assert_eq!(parquet(&parquet_path, mmlu_row).unwrap(), rows);
}

#[test]
fn columns_of_another_name_or_type_are_refused_with_the_row() {
    let dir = TempDir::new().unwrap();
    let path = dir.path().join("rows.parquet");
    write_parquet(&path, ["question", "subject"], &[["q", "a", "b", "c", "d", "A"].map(String::from).to_vec()]);
    let refusal = |make: fn(&Columns<'_>) -> Result<[String; 1], String>| parquet(&path, make).unwrap_err().to_string();
    for (error, want) in [
        (refusal(|c| Ok([c.text("input")?])), "row 1 (counted from 1): there is no column `input`"),
        (refusal(|c| Ok([c.text("answer")?])), "column `answer` is no text"),
        (refusal(|c| Ok([c.integer("question")?.to_string()])), "column `question` is no whole number"),
        (refusal(|c| c.texts::<5>("choices").map(|_| [String::new()])), "column `choices` is no list of 5 texts"),
        (refusal(|c| c.texts::<1>("question")), "column `question` is no list of 1 texts"),
    ] {
        assert!(error.contains(want) && error.contains("rows.parquet"), "{error}");
    }
}

#[test]
fn files_that_are_no_parquet_or_of_unknown_types_are_refused() {
    let make: fn(&Columns<'_>) -> Result<[String; 1], String> = |c| Ok([c.text("a")?]);
    let (dir, path) = file("rows.parquet", "PAR1 this is none PAR1");
    assert!(parquet(&path, make).unwrap_err().to_string().contains("is not readable Parquet"));
    let schema = Arc::new(parse_message_type("message m { required double a; }").unwrap());
    let path = dir.path().join("other.parquet");
    SerializedFileWriter::new(File::create(&path).unwrap(), schema, Arc::default()).unwrap().close().unwrap();
    let error = parquet(&path, make).unwrap_err().to_string();
    assert!(error.ends_with("column \"a\" is neither text nor whole numbers"), "{error}");
}

#[test]
fn a_csv_row_with_other_than_six_fields_is_named() {
    let (_dir, path) = file("rows.csv", "q,a,b,c,d,A\nq,a,b,c,A\n");
    let error = csv::<6>(&path).unwrap_err().to_string();
    assert!(error.ends_with("rows.csv: row 2 (counted from 1): has 5 fields instead of 6"), "{error}");
}

#[test]
fn json_lines_are_read_in_order_and_bad_ones_named() {
    let (_dir, path) = file("rows.jsonl", "{\"b\":\"2\",\"a\":\"1\\u2028\"}\n\n{\"a\":\"3\",\"b\":\"4\",\"c\":5}");
    let rows = json_lines(&path, ["a", "b"]).unwrap();
    assert_eq!(rows, [["1\u{2028}", "2"], ["3", "4"]].map(|row| row.map(String::from)));
    for (text, want) in [
        ("{\"a\":\"1\"}\n{\"a\":", "row 2 (counted from 1): is not JSON: EOF"),
        ("{\"a\":\"1\"}\n{\"b\":\"1\"}", "row 2 (counted from 1): has no text `a`"),
        ("{\"a\":7}", "row 1 (counted from 1): has no text `a`"),
        ("[1]", "has no text `a`"),
    ] {
        let (_dir, path) = file("rows.jsonl", text);
        let error = json_lines(&path, ["a"]).unwrap_err().to_string();
        assert!(error.contains(want) && error.contains("rows.jsonl"), "{error}");
    }
}

#[test]
fn json_lists_are_read_from_the_document_or_under_a_key() {
    let want = vec![["1".to_string()]];
    let (_dir, path) = file("rows.json", "[{\"a\":\"1\"}]");
    assert_eq!(json_list(&path, None, ["a"]).unwrap(), want);
    assert!(json_list(&path, Some("rows"), ["a"]).unwrap_err().to_string().contains("has no list `rows`"));
    let (_dir, path) = file("rows.json", "{\"rows\":[{\"a\":\"1\"}]}");
    assert_eq!(json_list(&path, Some("rows"), ["a"]).unwrap(), want);
    assert!(json_list(&path, None, ["a"]).unwrap_err().to_string().contains("is not a JSON list"));
    let error = json_list(&path, Some("rows"), ["b"]).unwrap_err().to_string();
    assert!(error.contains("row 1 (counted from 1): has no text `b`"), "{error}");
}
