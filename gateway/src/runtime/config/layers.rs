//! Layers of a configuration, each over the one before: what gateways share (`[source]`), the file, the environment.

use std::{ffi::OsString, path::Path};

use toml::{Table, Value};

use super::{Config, ConfigError, SettingError, docs};
use crate::runtime::data_dir::read_bounded;

/// Prefix of variables. Behind it are the section and the key, as in `SEAWALL_LIMITS__HEAD_BYTES_MAX`.
const PREFIX: &str = "SEAWALL_";
/// Separates section and key. Kubernetes makes no such names.
const SEPARATOR: &str = "__";
/// Suffix of a variable that names a file with the value, such as a mounted secret.
const FILE_SUFFIX: &str = "_file";
/// Maximum length of such a file, in bytes.
const VALUE_BYTES_MAX: u64 = 64 << 10;

/// Settings that a shared configuration cannot have: they are needed to find it and to keep it.
const OF_ONE_NODE: [(&str, Option<&str>); 2] = [("source", None), ("server", Some("data_dir"))];

/// Whether a variable is meant as a setting in its long form.
#[must_use]
pub fn is_long_form(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|rest| rest.contains(SEPARATOR))
}

/// The settings of a text that gateways share.
///
/// # Errors
/// One line: it is not a configuration, or has a setting of one node.
pub(super) fn shared(text: &str) -> Result<Table, ConfigError> {
    let problem = |problem: String| ConfigError::Shared { problem };
    Config::from_toml(text).map_err(problem)?;
    let table: Table = toml::from_str(text).map_err(|_| problem("not TOML".to_owned()))?;
    for (section, key) in OF_ONE_NODE {
        let found = table.get(section);
        let is_there = match key {
            Some(key) => found.is_some_and(|found| found.get(key).is_some()),
            None => found.is_some(),
        };
        if is_there {
            let setting = key.map_or_else(|| format!("[{section}]"), |key| format!("{section}.{key}"));
            return Err(problem(format!(
                "{setting} is a setting of one node, and is not allowed in what nodes share"
            )));
        }
    }
    Ok(table)
}

/// The settings of the environment in their long form.
///
/// # Errors
/// A variable is unknown, has a value of the wrong kind, or its file can't be read. The error never repeats a value.
pub(super) fn of_environment(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Table, ConfigError> {
    let mut settings = Table::new();
    let mut variables: Vec<_> = variables
        .into_iter()
        .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
        .filter(|(name, _)| is_long_form(name))
        .collect();
    variables.sort_unstable();
    for (name, value) in variables {
        let wrong =
            |problem: &str| ConfigError::from(SettingError::new(format!("environment variable {name}"), problem));
        let path = name[PREFIX.len()..].to_ascii_lowercase();
        let (section, key) = path.split_once(SEPARATOR).unwrap_or((&path, ""));
        let value = value.into_string().map_err(|_| wrong("expected UTF-8"))?;
        let (key, value) = if docs::is_setting(section, key) {
            (key, value)
        } else {
            let key = key
                .strip_suffix(FILE_SUFFIX)
                .filter(|key| docs::is_setting(section, key))
                .ok_or_else(|| wrong("is not a setting; docs/CONFIG.md has all of them"))?;
            (key, read_value(Path::new(&value)).map_err(|problem| wrong(&problem))?)
        };
        let value = typed(section, key, value).map_err(|problem| wrong(&problem))?;
        let given = settings.entry(section).or_insert_with(|| Table::new().into());
        if let Value::Table(keys) = given
            && keys.insert(key.to_owned(), value).is_some()
        {
            return Err(wrong("is given twice: by itself and by a file"));
        }
    }
    Ok(settings)
}

/// The content of a file, without the line break at its end.
fn read_value(path: &Path) -> Result<String, String> {
    let bytes = read_bounded(path, VALUE_BYTES_MAX).map_err(|error| format!("the file can't be read: {error}"))?;
    let text = String::from_utf8(bytes).map_err(|_| "the file is not UTF-8".to_owned())?;
    Ok(text.trim_end_matches(['\r', '\n']).to_owned())
}

/// The value of a setting: as it stands in a file if that fits, else as text.
fn typed(section: &str, key: &str, text: String) -> Result<Value, String> {
    let literal = toml::from_str::<Table>(&format!("value = {text}")).ok();
    let literal = literal
        .filter(|table| table.len() == 1)
        .and_then(|mut table| table.remove("value"));
    let mut problem = String::new();
    for value in literal.into_iter().chain([Value::String(text)]) {
        let keys = Table::from_iter([(key.to_owned(), value.clone())]);
        let settings = Table::from_iter([(section.to_owned(), Value::Table(keys))]);
        match Config::from_toml(&settings.to_string()) {
            Ok(_) => return Ok(value),
            Err(error) => problem = error,
        }
    }
    // The line is that of no file.
    let problem = problem.rsplit(": ").next().unwrap_or_default();
    Err(problem.to_owned())
}

/// Lays settings over others, key by key.
pub(super) fn overlay(below: &mut Table, above: Table) {
    for (section, value) in above {
        match (below.get_mut(&section), value) {
            (Some(Value::Table(below)), Value::Table(above)) => below.extend(above),
            (_, value) => drop(below.insert(section, value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(variables: &[(&str, &str)]) -> Result<Config, String> {
        let variables = variables.iter().map(|(name, value)| (name.into(), value.into()));
        let settings = of_environment(variables).map_err(|error| error.to_string())?;
        Ok(settings.try_into().unwrap())
    }

    #[test]
    fn every_kind_of_setting_has_a_long_form() {
        let config = of(&[
            ("SEAWALL_LIMITS__HEAD_BYTES_MAX", "16384"),
            ("SEAWALL_SERVER__NODE", "7"),
            ("SEAWALL_SERVER__SHARE_PORT", "true"),
            ("SEAWALL_SERVER__LISTEN", "127.0.0.1:9000"),
            ("SEAWALL_LOGGING__LEVEL", "info,seawall_gateway::lookup=debug"),
            ("SEAWALL_ADMISSION__TENANT_WEIGHTS", "{ big = 10 }"),
            ("SEAWALL_SERVER__PATHS", "[\"/v1/connect\", \"/ws\"]"),
            ("SEAWALL_DATABASE__URL", "postgres://u:p@h/d"),
            ("SEAWALL_LISTEN", "of the short form"),
            ("SEAWALL_PORT_8080_TCP", "of Kubernetes"),
            ("HOME", "/"),
        ])
        .unwrap();

        assert_eq!(config.limits.head_bytes_max, 16_384);
        assert_eq!(config.server.node.as_deref(), Some("7"));
        assert!(config.server.share_port);
        assert_eq!(config.server.listen.port(), 9_000);
        assert_eq!(config.logging.level, "info,seawall_gateway::lookup=debug");
        assert_eq!(config.admission.tenant_weights.get("big"), Some(&10));
        assert!(config.database.url.is_some());
    }

    #[test]
    fn secret_of_a_file_is_read_without_its_line_break() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("url");
        std::fs::write(&file, "postgres://u:p@h/d\r\n").unwrap();

        let config = of(&[("SEAWALL_DATABASE__URL_FILE", file.to_str().unwrap())]).unwrap();

        assert_eq!(config.database.url, Some("postgres://u:p@h/d".parse().unwrap()));
        let both = [
            ("SEAWALL_DATABASE__URL", "postgres://u:p@h/d"),
            ("SEAWALL_DATABASE__URL_FILE", file.to_str().unwrap()),
        ];
        assert!(of(&both).unwrap_err().contains("given twice"));
        // A setting that is a file itself stays one.
        let config = of(&[("SEAWALL_WEBHOOK__SECRET_FILE", "/run/secrets/webhook")]).unwrap();
        assert_eq!(config.webhook.secret_file, Some("/run/secrets/webhook".into()));
    }

    #[test]
    fn unknown_and_wrong_variables_are_named_without_their_values() {
        for (name, value, expected) in [
            ("SEAWALL_LIMITS__HEAD_BYTE_MAX", "hidden", "is not a setting"),
            ("SEAWALL_LIMIT__HEAD_BYTES_MAX", "hidden", "is not a setting"),
            ("SEAWALL_LIMITS__", "hidden", "is not a setting"),
            ("SEAWALL_LIMITS__HEAD_BYTES_MAX", "hidden", "expected usize"),
            ("SEAWALL_LIMITS__HEAD_BYTES_MAX", "", "expected usize"),
            (
                "SEAWALL_LIMITS__HEAD_BYTES_MAX",
                "1\nframe_bytes_max = 2",
                "expected usize",
            ),
            ("SEAWALL_LOGGING__FORMAT", "hidden", "expected one of"),
            ("SEAWALL_SERVER__SHARE_PORT", "hidden", "expected a boolean"),
            ("SEAWALL_DATABASE__URL_FILE", "/hidden/away", "can't be read"),
        ] {
            let problem = of(&[(name, value)]).unwrap_err();

            assert!(problem.contains(name) && problem.contains(expected), "{problem}");
            assert!(!problem.contains("hidden") && !problem.contains('\n'), "{problem}");
        }
    }

    #[test]
    fn upper_layer_wins_key_by_key() {
        let mut settings: Table = toml::from_str("[limits]\nhead_bytes_max = 1\nframe_bytes_max = 2\n").unwrap();

        overlay(
            &mut settings,
            toml::from_str("[limits]\nhead_bytes_max = 3\n[drain]\nrate_per_second = 4\n").unwrap(),
        );

        let expected: Table =
            toml::from_str("[limits]\nhead_bytes_max = 3\nframe_bytes_max = 2\n[drain]\nrate_per_second = 4\n")
                .unwrap();
        assert_eq!(settings, expected);
    }

    #[test]
    fn what_nodes_share_has_no_setting_of_one_node() {
        for (text, named) in [
            ("[source]\nurls = []\n", "[source]"),
            ("[server]\ndata_dir = \"x\"\n", "server.data_dir"),
            ("[limits]\nhead_byte_max = 1\n", "head_byte_max"),
            ("<html>", "line 1"),
        ] {
            let problem = shared(text).unwrap_err().to_string();

            assert!(problem.contains("source.urls") && problem.contains(named), "{problem}");
        }
        assert!(shared("[server]\nshare_port = true\n").is_ok());
    }
}
