//! Reads the fields of a request body, with one kind of message for every mistake.

use serde::de::{DeserializeOwned, Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};
use std::fmt;

/// Why a body is no valid request.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RequestError {
    pub param: Option<String>,
    pub message: String,
}

impl RequestError {
    pub(super) fn whole(message: String) -> Self {
        Self { param: None, message }
    }

    pub(super) fn field(param: &str, message: String) -> Self {
        Self { param: Some(param.into()), message }
    }
}

/// What an endpoint does not serve.
pub(super) struct Refused {
    pub field: &'static str,
    /// The value that asks for nothing, and is fine.
    pub nothing: &'static str,
    /// What to do instead, if anything.
    pub instead: &'static str,
}

/// The fields of a body that are not read yet.
pub(super) struct Fields(Map<String, Value>);

impl Fields {
    /// Reads a JSON object; a field that is null is absent.
    ///
    /// # Errors
    /// Bytes that are no JSON object, or a field that stands in it twice.
    pub(super) fn read(body: &[u8]) -> Result<Self, RequestError> {
        let unique: Unique = serde_json::from_slice(body).map_err(|e| {
            let what = if e.is_data() { "must be a JSON object with each field once" } else { "is not valid JSON" };
            RequestError::whole(format!("the body {what}: {e}"))
        })?;
        let mut fields = unique.0;
        fields.retain(|_, value| !value.is_null());
        Ok(Self(fields))
    }

    /// Refuses what is not served, unless it asks for nothing.
    pub(super) fn refuse(&mut self, refused: &[Refused]) -> Result<(), RequestError> {
        for Refused { field, nothing, instead } in refused {
            if let Some(value) = self.0.remove(*field)
                && value.to_string().as_str() != *nothing
            {
                let message = format!(
                    "{field} is not supported by this server{instead}; leave it out or give {nothing}; got {}",
                    shown(&value)
                );
                return Err(RequestError::field(field, message));
            }
        }
        Ok(())
    }

    /// Refuses a field that none of `known` is: it might change the meaning, so it is not ignored.
    pub(super) fn check_known(&self, known: &[&[&str]]) -> Result<(), RequestError> {
        let names = || known.iter().flat_map(|k| k.iter());
        match self.0.keys().find(|f| !names().any(|name| name == f)) {
            None => Ok(()),
            Some(field) => {
                let (field, names) = (cut(field), names().copied().collect::<Vec<_>>().join(", "));
                Err(RequestError::field(&field, format!("unknown field `{field}`; known are {names}")))
            }
        }
    }

    /// Takes a field out.
    pub(super) fn take<T: DeserializeOwned>(&mut self, field: &str, expected: &str) -> Result<Option<T>, RequestError> {
        let Some(value) = self.0.remove(field) else { return Ok(None) };
        T::deserialize(&value).map(Some).map_err(|_| wrong(field, expected, &value))
    }
}

/// The message about a value of the wrong kind.
pub(super) fn wrong(field: &str, expected: &str, value: &Value) -> RequestError {
    RequestError::field(field, format!("{field} must be {expected}; got {}", shown(value)))
}

/// A value as it was given, cut to a length that fits a message.
pub(super) fn shown(value: &Value) -> String {
    match value {
        // The beginning of a long array tells as much as all of it.
        Value::Array(items) => cut(&Value::Array(items.iter().take(40).cloned().collect()).to_string()),
        other => cut(&other.to_string()),
    }
}

/// A text as it was given, in quotes.
pub(super) fn quoted(text: &str) -> String {
    format!("{:?}", cut(text))
}

fn cut(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    match text.char_indices().nth(CHARS_MAX) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_string(),
    }
}

/// A JSON object whose keys are unique: of two values for one field, neither can be taken for the one that was meant.
struct Unique(Map<String, Value>);

impl<'de> Deserialize<'de> for Unique {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object;

        impl<'de> Visitor<'de> for Object {
            type Value = Map<String, Value>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a JSON object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Self::Value, A::Error> {
                let mut map = Map::new();
                while let Some((key, value)) = access.next_entry::<String, Value>()? {
                    if map.contains_key(&key) {
                        return Err(A::Error::custom(format!("the field `{}` is given twice", cut(&key))));
                    }
                    map.insert(key, value);
                }
                Ok(map)
            }
        }

        deserializer.deserialize_map(Object).map(Self)
    }
}
