//! Rows of the files that benchmarks are published in.

use super::source::DataError;
use parquet::basic::{ConvertedType, Type};
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use serde_json::Value;
use std::fs;
use std::path::Path;

/// Rows of N texts each.
pub(super) type Rows<const N: usize> = Vec<[String; N]>;

/// Rows of a CSV file without a header.
pub(super) fn csv<const N: usize>(path: &Path) -> Result<Rows<N>, DataError> {
    let text = read_text(path)?;
    let mut reader = csv::ReaderBuilder::new().has_headers(false).flexible(true).from_reader(text.as_bytes());
    let mut rows = Vec::new();
    for (i, record) in reader.records().enumerate() {
        let record = record.map_err(|e| DataError::row(path, i, e))?;
        let fields: Vec<String> = record.iter().map(str::to_string).collect();
        let found = fields.len();
        rows.push(
            fields.try_into().map_err(|_| DataError::row(path, i, format!("has {found} fields instead of {N}")))?,
        );
    }
    Ok(rows)
}

/// Rows of a file with one JSON object per line: the texts under `keys`.
pub(super) fn json_lines<const N: usize>(path: &Path, keys: [&str; N]) -> Result<Rows<N>, DataError> {
    let text = read_text(path)?;
    let lines = text.split('\n').filter(|line| !line.trim().is_empty());
    let parsed = lines.enumerate().map(|(i, line)| {
        let row = serde_json::from_str(line).map_err(|e| DataError::row(path, i, format!("is not JSON: {e}")))?;
        texts(&row, keys).map_err(|e| DataError::row(path, i, e))
    });
    parsed.collect()
}

/// Rows of a JSON list of objects, which is under `list` in the document or the document itself.
pub(super) fn json_list<const N: usize>(
    path: &Path,
    list: Option<&str>,
    keys: [&str; N],
) -> Result<Rows<N>, DataError> {
    let document: Value =
        serde_json::from_str(&read_text(path)?).map_err(|e| DataError::file(path, format!("is not JSON: {e}")))?;
    let rows = list.map_or(Some(&document), |key| document.get(key)).and_then(Value::as_array);
    let rows = rows.ok_or_else(|| match list {
        Some(key) => DataError::file(path, format!("has no list `{key}`")),
        None => DataError::file(path, "is not a JSON list"),
    })?;
    rows.iter().enumerate().map(|(i, row)| texts(row, keys).map_err(|e| DataError::row(path, i, e))).collect()
}

fn texts<const N: usize>(row: &Value, keys: [&str; N]) -> Result<[String; N], String> {
    if let Some(missing) = keys.iter().find(|key| row.get(key).and_then(Value::as_str).is_none()) {
        return Err(format!("has no text `{missing}`"));
    }
    Ok(keys.map(|key| row[key].as_str().unwrap_or_default().to_string()))
}

/// Rows of a Parquet file, each made from its columns by `make`.
pub(super) fn parquet<const N: usize>(
    path: &Path,
    make: fn(&Columns<'_>) -> Result<[String; N], String>,
) -> Result<Rows<N>, DataError> {
    let unreadable = |e: parquet::errors::ParquetError| DataError::file(path, format!("is not readable Parquet: {e}"));
    let reader = SerializedFileReader::try_from(path).map_err(unreadable)?;
    for column in reader.metadata().file_metadata().schema_descr().columns() {
        // The reader has no error for types it does not know.
        if !matches!(
            (column.physical_type(), column.converted_type()),
            (Type::BYTE_ARRAY, ConvertedType::UTF8)
                | (Type::INT32 | Type::INT64, ConvertedType::NONE | ConvertedType::INT_32 | ConvertedType::INT_64)
        ) {
            return Err(DataError::file(path, format!("column {} is neither text nor whole numbers", column.path())));
        }
    }
    let rows = reader.get_row_iter(None).map_err(unreadable)?;
    let made = rows
        .enumerate()
        .map(|(i, row)| make(&Columns(&row.map_err(unreadable)?)).map_err(|e| DataError::row(path, i, e)));
    made.collect()
}

/// One row's columns, by name.
pub(super) struct Columns<'a>(&'a Row);

impl Columns<'_> {
    pub(super) fn text(&self, name: &str) -> Result<String, String> {
        match self.field(name)? {
            Field::Str(text) => Ok(text.clone()),
            _ => Err(format!("column `{name}` is no text")),
        }
    }

    pub(super) fn integer(&self, name: &str) -> Result<i64, String> {
        match self.field(name)? {
            Field::Long(number) => Ok(*number),
            Field::Int(number) => Ok(i64::from(*number)),
            _ => Err(format!("column `{name}` is no whole number")),
        }
    }

    pub(super) fn texts<const N: usize>(&self, name: &str) -> Result<[String; N], String> {
        let found: Vec<String> = match self.field(name)? {
            Field::ListInternal(list) => list.elements().iter().filter_map(text_of).collect(),
            _ => Vec::new(),
        };
        found.try_into().map_err(|_| format!("column `{name}` is no list of {N} texts"))
    }

    fn field(&self, name: &str) -> Result<&Field, String> {
        let column = self.0.get_column_iter().find(|(column, _)| *column == name);
        column.map(|(_, field)| field).ok_or_else(|| format!("there is no column `{name}`"))
    }
}

fn text_of(field: &Field) -> Option<String> {
    match field {
        Field::Str(text) => Some(text.clone()),
        _ => None,
    }
}

/// A file of UTF-8 text.
pub(super) fn read_text(path: &Path) -> Result<String, DataError> {
    fs::read_to_string(path).map_err(|source| DataError::Io { path: path.to_path_buf(), source })
}

#[cfg(test)]
pub(super) mod tests;
