//! `config.json` of a folder: its keys in their order, known or not.

use super::folder::read_at_most;
use crate::Error;
use serde::{Serialize, de::DeserializeOwned};
use serde_json::{Map, Value};
use std::path::{Path, PathBuf};

/// Name of the file in its folder.
pub(crate) const CONFIG_FILE: &str = "config.json";

/// Name of the file with defaults of text generation.
const GENERATION_FILE: &str = "generation_config.json";

/// Length of a `config.json` at most.
const MAX_BYTES: u64 = 1 << 24;

/// The keys of a `config.json`, or of a section of it.
#[derive(Debug, Clone)]
pub(crate) struct ConfigJson {
    path: PathBuf,
    /// Prefix of keys in messages: empty, or the section and a dot.
    prefix: String,
    keys: Map<String, Value>,
}

impl ConfigJson {
    /// Reads the file of the folder `folder`.
    ///
    /// # Errors
    /// If it is missing or no JSON object.
    pub(crate) fn read(folder: &Path) -> Result<ConfigJson, Error> {
        ConfigJson::parse(folder, &ConfigJson::bytes(folder)?)
    }

    /// Reads the bytes of the file of the folder `folder`.
    ///
    /// # Errors
    /// If it is missing, no file or too long.
    pub(crate) fn bytes(folder: &Path) -> Result<Vec<u8>, Error> {
        read_at_most(&folder.join(CONFIG_FILE), MAX_BYTES)
    }

    /// Reads `generation_config.json` of the folder `folder`, if there is one.
    ///
    /// # Errors
    /// If it is no JSON object.
    pub(crate) fn read_generation(folder: &Path) -> Result<Option<ConfigJson>, Error> {
        let path = folder.join(GENERATION_FILE);
        if !path.exists() {
            return Ok(None);
        }
        ConfigJson::of_text(path.clone(), &read_at_most(&path, MAX_BYTES)?).map(Some)
    }

    /// Parses the text of the file of the folder `folder`, which another rank may have read.
    ///
    /// # Errors
    /// If it is no JSON object.
    pub(crate) fn parse(folder: &Path, text: &[u8]) -> Result<ConfigJson, Error> {
        ConfigJson::of_text(folder.join(CONFIG_FILE), text)
    }

    fn of_text(path: PathBuf, text: &[u8]) -> Result<ConfigJson, Error> {
        let keys = serde_json::from_slice(text)
            .map_err(|error| Error::Folder(format!("{}: {error}", path.display())))?;
        Ok(ConfigJson {
            path,
            prefix: String::new(),
            keys,
        })
    }

    /// Returns a configuration without keys that is to be written to `path`.
    pub(crate) fn empty(path: PathBuf) -> ConfigJson {
        ConfigJson {
            path,
            prefix: String::new(),
            keys: Map::new(),
        }
    }

    /// Returns the file's path.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Returns all keys in their order.
    pub(crate) fn keys(&self) -> &Map<String, Value> {
        &self.keys
    }

    /// Returns an error about a key.
    pub(crate) fn error(&self, key: &str, reason: impl std::fmt::Display) -> Error {
        let path = self.path.display();
        Error::Folder(format!("{path}: {}{key}: {reason}", self.prefix))
    }

    /// True if the key has a value other than null.
    pub(crate) fn has(&self, key: &str) -> bool {
        self.keys.get(key).is_some_and(|value| !value.is_null())
    }

    /// Returns the value of a key; `None` if it is absent or null.
    ///
    /// # Errors
    /// If it is of another type.
    pub(crate) fn get<T: DeserializeOwned>(&self, key: &str) -> Result<Option<T>, Error> {
        let value = self.keys.get(key).filter(|value| !value.is_null());
        let Some(value) = value else {
            return Ok(None);
        };
        let parsed = serde_json::from_value(value.clone());
        parsed.map(Some).map_err(|error| self.error(key, error))
    }

    /// Returns the value of a key, or `default`.
    ///
    /// # Errors
    /// If it is of another type.
    pub(crate) fn get_or<T: DeserializeOwned>(&self, key: &str, default: T) -> Result<T, Error> {
        Ok(self.get(key)?.unwrap_or(default))
    }

    /// Returns the value of a key that may be null, which means none. An absent key means `absent`.
    ///
    /// # Errors
    /// If it is of another type.
    pub(crate) fn nullable<T: DeserializeOwned>(
        &self,
        key: &str,
        absent: Option<T>,
    ) -> Result<Option<T>, Error> {
        if self.keys.contains_key(key) {
            self.get(key)
        } else {
            Ok(absent)
        }
    }

    /// Returns the value of the first of these keys that has one.
    ///
    /// # Errors
    /// If none has, or it is of another type.
    pub(crate) fn require<T: DeserializeOwned>(&self, keys: &[&str]) -> Result<T, Error> {
        for key in keys {
            if let Some(value) = self.get(key)? {
                return Ok(value);
            }
        }
        Err(self.error(keys[0], "the key is missing"))
    }

    /// Returns an object as a section of its own.
    ///
    /// # Errors
    /// If the key's value is no object.
    pub(crate) fn section(&self, key: &str) -> Result<Option<ConfigJson>, Error> {
        let keys = self.get(key)?;
        Ok(keys.map(|keys| ConfigJson {
            path: self.path.clone(),
            prefix: format!("{}{key}.", self.prefix),
            keys,
        }))
    }

    /// Refuses another value than these of a key that moerun has no counterpart for.
    ///
    /// # Errors
    /// If the key has another value.
    pub(crate) fn expect(&self, key: &str, allowed: &[Value]) -> Result<(), Error> {
        let Some(value) = self.keys.get(key).filter(|value| !value.is_null()) else {
            return Ok(());
        };
        if allowed.contains(value) {
            return Ok(());
        }
        let allowed: Vec<String> = allowed.iter().map(Value::to_string).collect();
        Err(self.error(
            key,
            format!("{value} is not supported, only {}", allowed.join(" or ")),
        ))
    }

    /// Sets a key in its place, or adds it at the end.
    pub(crate) fn set(&mut self, key: &str, value: impl Serialize) {
        let value = serde_json::to_value(value).expect("values of a configuration are plain data");
        self.keys.insert(key.to_string(), value);
    }

    /// Removes a key and keeps the order of the others.
    pub(crate) fn remove(&mut self, key: &str) {
        self.keys.shift_remove(key);
    }

    /// Returns the text of the file.
    pub(crate) fn to_text(&self) -> String {
        let text = serde_json::to_string_pretty(&self.keys);
        text.expect("a JSON object is writable") + "\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(text: &str) -> ConfigJson {
        ConfigJson {
            keys: serde_json::from_str(text).unwrap(),
            ..ConfigJson::empty("m/config.json".into())
        }
    }

    #[test]
    fn unknown_keys_and_their_order_survive() {
        let text = "{\n  \"z\": 1e-06,\n  \"a\": {\n    \"y\": [],\n    \"b\": null\n  },\n  \
                    \"k\": 18446744073709551615\n}\n";
        let mut config = parse(text);
        config.set("z", 1e-6);
        config.remove("absent");
        assert_eq!(config.to_text(), text.replace("1e-06", "1e-6"));
    }

    #[test]
    fn messages_name_file_and_key() {
        let config = parse("{\"a\": {\"b\": \"x\"}, \"act\": \"gelu\"}");
        let section = config.section("a").unwrap().unwrap();
        let wrong = section.get::<u64>("b").unwrap_err().to_string();
        assert!(
            wrong.starts_with("m/config.json: a.b: invalid type"),
            "{wrong}"
        );
        let missing = config.require::<u64>(&["c", "d"]).unwrap_err().to_string();
        assert_eq!(missing, "m/config.json: c: the key is missing");
        let other = config.expect("act", &[json!("silu")]).unwrap_err();
        assert_eq!(
            other.to_string(),
            "m/config.json: act: \"gelu\" is not supported, only \"silu\""
        );
        config.expect("absent", &[]).unwrap();
    }
}
