//! Configuration: a file of sections, overridden by the environment, overridden by the flags. Start with [`Config`].
//!
//! `Config::default()` has production values, with which a gateway can run. Nothing here opens a socket or a database;
//! [`Config::validate`] checks the settings alone. docs/CONFIG.md is generated from this module.

use std::{
    collections::{BTreeMap, BTreeSet},
    ffi::OsString,
    fmt::{self, Write as _},
    path::{Path, PathBuf},
};

use seawall_proto::{admission::AdmissionConfig, hello::IdentityNames};
use serde::{Deserialize, Deserializer, Serialize, de::Error as _};
use sha2::{Digest as _, Sha256};

pub mod docs;
mod layers;
mod level;
pub mod listen;
mod proxies;
pub mod section;
mod sections;
mod url;

pub use layers::is_long_form;
pub use level::{InvalidLevel, parse_level};
pub use proxies::Proxies;
pub use sections::{
    BreakerMode, BreakerSettings, Database, Drain, Limits, LogFormat, Logging, Ops, PresenceSettings, ProxySettings,
    ResumeTokens, RulesSync, Server, Session, SourceSettings, TlsSettings, WebhookSettings,
};
pub use url::{DatabaseKind, DatabaseUrl, InvalidDatabaseUrl};

/// Minimum memory setting, in bytes: hardly more than the program itself needs.
const MEMORY_MIN: u64 = 64 << 20;

/// Maximum configuration file, in bytes: a larger one is a wrong file.
const FILE_BYTES_MAX: u64 = 1024 * 1024;

/// Maximum length of a setting's path that an error repeats, in bytes. The longest existing path has 52.
const PATH_LEN_MAX: usize = 64;

/// Every setting of one gateway.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    pub source: SourceSettings,
    pub server: Server,
    pub tls: TlsSettings,
    pub proxy: ProxySettings,
    pub ops: Ops,
    pub database: Database,
    /// Headers and parameters that carry the identity.
    pub identity: IdentityNames,
    /// Which devices are looked up, and when the others return.
    pub admission: AdmissionConfig,
    pub limits: Limits,
    pub session: Session,
    pub presence: PresenceSettings,
    pub resume: ResumeTokens,
    pub rules: RulesSync,
    pub breaker: BreakerSettings,
    pub drain: Drain,
    pub webhook: WebhookSettings,
    pub logging: Logging,
}

impl Config {
    /// Reads a TOML file over the defaults. Does not validate, because flags override it first.
    ///
    /// # Errors
    /// The file cannot be read, is not TOML, or has an unknown key or a value of the wrong type.
    pub fn from_file(path: &Path) -> Result<Self, ConfigError> {
        let text = text_of(path)?;
        Self::from_toml(&text).map_err(|problem| ConfigError::Invalid {
            path: path.to_owned(),
            problem,
        })
    }

    /// Reads a configuration from its layers, each over the one before: the defaults, what nodes share, the file, and
    /// the long forms of the environment. Does not validate, because flags override it first.
    ///
    /// # Errors
    /// A layer cannot be read, or has an unknown key or a value of the wrong type.
    pub fn from_layers(
        shared: Option<&str>,
        file: Option<&Path>,
        variables: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigError> {
        let mut settings = shared.map_or_else(|| Ok(toml::Table::new()), layers::shared)?;
        if let Some(path) = file {
            let invalid = |problem| ConfigError::Invalid {
                path: path.to_owned(),
                problem,
            };
            let text = text_of(path)?;
            Self::from_toml(&text).map_err(invalid)?;
            let file = toml::from_str(&text).map_err(|error| invalid(one_line(&text, &error)))?;
            layers::overlay(&mut settings, file);
        }
        layers::overlay(&mut settings, layers::of_environment(variables)?);
        // Each layer is a configuration by itself, so all together are one.
        let text = settings.to_string();
        Self::from_toml(&text).map_err(|problem| ConfigError::Shared { problem })
    }

    /// Parses TOML over the defaults.
    ///
    /// # Errors
    /// One line that names the key and, if known, the line of the file.
    pub fn from_toml(text: &str) -> Result<Self, String> {
        toml::from_str(text).map_err(|error| one_line(text, &error))
    }

    /// Adds the position in the file to an error of [`Config::validate`], if the value is the file's.
    #[must_use]
    pub fn locate(error: SettingError, path: &Path) -> ConfigError {
        let is_of_file = Self::from_file(path).is_ok_and(|file| file.validate().is_err_and(|found| found == error));
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let mut lines = 0..text.lines().count();
        match lines.find(|line| path_at(&text, *line) == error.field) {
            Some(line) if is_of_file => ConfigError::Invalid {
                path: path.to_owned(),
                problem: format!("line {}: {error}", line + 1),
            },
            Some(_) | None => error.into(),
        }
    }

    /// Checks every setting, and those that depend on each other.
    ///
    /// # Errors
    /// The first invalid setting, by its path.
    pub fn validate(&self) -> Result<(), SettingError> {
        self.source.check_bounds()?;
        self.server.check_bounds()?;
        self.tls.check_bounds()?;
        self.ops.check_bounds()?;
        self.identity
            .validate()
            .map_err(|error| SettingError::new(format!("identity.{}", error.setting), error.reason))?;
        self.admission
            .validate()
            .map_err(|error| SettingError::new(format!("admission.{}", error.setting), error.reason))?;
        self.limits.check_bounds()?;
        self.session.check_bounds()?;
        self.presence.check_bounds()?;
        self.resume.check_bounds()?;
        self.rules.check_bounds()?;
        self.drain.check_bounds()?;
        self.check_texts()?;
        Proxies::of(&self.proxy).map_err(|problem| SettingError::new("proxy.trusted", problem))?;
        self.check_together()
    }

    /// The database in use: the configured one, or else the file in the data directory.
    #[must_use]
    pub fn database_url(&self) -> DatabaseUrl {
        self.database
            .url
            .clone()
            .unwrap_or_else(|| DatabaseUrl::sqlite(&self.server.data_dir.join("seawall.db")))
    }

    /// The configuration without the password of the database's URL, and without the paths of other URLs: tokens stand
    /// there.
    #[must_use]
    pub fn without_secrets(&self) -> Self {
        let mut shown = self.clone();
        // `Display` leaves the password out.
        shown.database.url = self.database_url().to_string().parse().ok();
        let hide = |url: &String| format!("{}/…", origin(url));
        shown.webhook.url = self.webhook.url.as_ref().map(hide);
        shown.source.urls = self.source.urls.iter().map(hide).collect();
        shown
    }

    /// The settings that differ, by their paths.
    #[must_use]
    pub fn changes(&self, other: &Self) -> BTreeSet<String> {
        let (ours, theirs) = (settings(self), settings(other));
        let all: BTreeSet<&String> = ours.keys().chain(theirs.keys()).collect();
        let differs = |path: &&&String| ours.get(**path) != theirs.get(**path);
        all.iter().filter(differs).map(|path| (*path).clone()).collect()
    }

    /// Whether a running gateway uses a change of a setting at once. All others need a restart.
    #[must_use]
    pub fn is_reloaded(path: &str) -> bool {
        let alone = [
            "logging.level",
            "breaker.mode",
            "admission.lookups_per_second_max",
            "admission.keys_in_flight_max",
        ];
        path.starts_with("drain.") || alone.contains(&path)
    }

    /// Digest of the settings that are meant to be equal on all nodes: all but `[server]`, `[source]` and
    /// `ops.listen`. Passwords and paths of URLs are not part of it, so that it tells nothing about them. 16
    /// hexadecimal digits.
    #[must_use]
    pub fn digest_hex(&self) -> String {
        let mut text = String::new();
        for (path, value) in settings(&self.without_secrets()) {
            if !path.starts_with("server.") && !path.starts_with("source.") && path != "ops.listen" {
                // Writing to a text never fails.
                let _ = writeln!(text, "{path} = {value}");
            }
        }
        let digest: [u8; 32] = Sha256::digest(text.as_bytes()).into();
        data_encoding::HEXLOWER.encode(&digest[..8])
    }

    fn check_texts(&self) -> Result<(), SettingError> {
        if let Some(node) = &self.server.node
            && !matches!(seawall_proto::id::Label::parse(node), Ok(Some(_)))
        {
            return Err(SettingError::new(
                "server.node",
                "expected 1 to 64 bytes of printable ASCII",
            ));
        }
        if self.server.data_dir.as_os_str().is_empty() {
            return Err(SettingError::new("server.data_dir", "is empty"));
        }
        parse_level(&self.logging.level)
            .map(drop)
            .map_err(|problem| SettingError::new("logging.level", problem.to_string()))
    }

    fn check_together(&self) -> Result<(), SettingError> {
        if let Some((setting, problem)) = self.tls.mismatch() {
            return Err(SettingError::new(setting, problem));
        }
        if let Some(problem) = self.source.mismatch() {
            return Err(SettingError::new("source.urls", problem));
        }
        if let Some((setting, problem)) = self.webhook.mismatch() {
            return Err(SettingError::new(setting, problem));
        }
        if (self.proxy.protocol || self.proxy.forwarded_for) && self.proxy.trusted.is_empty() {
            return Err(SettingError::new("proxy.trusted", "trusts no load balancer"));
        }
        if self.ops.tls_certificate.is_some() != self.ops.tls_key.is_some() {
            return Err(SettingError::new(
                "ops.tls_key",
                "ops.tls_certificate and ops.tls_key must be set together",
            ));
        }
        if !self.ops.listen.ip().is_loopback() && self.ops.tls_certificate.is_none() && !self.ops.insecure {
            return Err(SettingError::new(
                "ops.listen",
                format!(
                    "{} is outside loopback, where tokens would cross the network in clear text: give ops.tls_certificate and ops.tls_key, or --insecure-ops if that is meant",
                    self.ops.listen
                ),
            ));
        }
        if self.server.listen.port() != 0 && self.server.listen == self.ops.listen {
            return Err(SettingError::new(
                "ops.listen",
                format!("{} is also the address for devices", self.ops.listen),
            ));
        }
        if (1..MEMORY_MIN).contains(&self.server.max_memory_bytes) {
            return Err(SettingError::new(
                "server.max_memory_bytes",
                format!(
                    "{} is less than a gateway needs: give at least {MEMORY_MIN}, or 0 for what there is",
                    self.server.max_memory_bytes
                ),
            ));
        }
        if self.drain.announce_seconds >= self.drain.deadline_seconds {
            return Err(SettingError::new(
                "drain.announce_seconds",
                "is not less than drain.deadline_seconds",
            ));
        }
        if self.limits.frame_bytes_max > self.limits.message_bytes_max {
            return Err(SettingError::new(
                "limits.frame_bytes_max",
                "is greater than limits.message_bytes_max",
            ));
        }
        Ok(())
    }
}

/// Reads a number of seconds, or a text such as `30s` or `8h`.
fn seconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Given {
        Seconds(u64),
        Text(String),
    }
    let expected = || D::Error::custom("expected a number of seconds, or text such as \"30s\"");
    match Given::deserialize(deserializer).map_err(|_| expected())? {
        Given::Seconds(seconds) => Ok(seconds),
        Given::Text(text) => {
            let time = humantime::parse_duration(&text).map_err(|_| expected())?;
            if time.subsec_nanos() == 0 {
                Ok(time.as_secs())
            } else {
                Err(expected())
            }
        }
    }
}

/// Every setting that has a value, by its path.
fn settings(config: &Config) -> BTreeMap<String, toml::Value> {
    let sections = toml::Table::try_from(config).unwrap_or_default();
    let keys = sections.into_iter().filter_map(|(section, keys)| {
        if let toml::Value::Table(keys) = keys {
            Some((section, keys))
        } else {
            None
        }
    });
    keys.flat_map(|(section, keys)| {
        keys.into_iter()
            .map(move |(key, value)| (format!("{section}.{key}"), value))
    })
    .collect()
}

/// Scheme, host and port of a URL. The rest may be a secret.
#[must_use]
pub fn origin(url: &str) -> String {
    let (scheme, rest) = url.split_once("://").unwrap_or(("", url));
    let authority = rest.split(['/', '?', '#']).next().unwrap_or_default();
    let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
    format!("{scheme}://{host}")
}

/// The text of a configuration file.
fn text_of(path: &Path) -> Result<String, ConfigError> {
    let unreadable = |source| ConfigError::Unreadable {
        path: path.to_owned(),
        source,
    };
    let length = std::fs::metadata(path).map_err(unreadable)?.len();
    if length > FILE_BYTES_MAX {
        return Err(unreadable(std::io::Error::other(format!(
            "{length} bytes: no configuration is greater than 1 MiB"
        ))));
    }
    std::fs::read_to_string(path).map_err(unreadable)
}

/// The message of a TOML error with its line number and the path of the key there, without any value of the file.
fn one_line(text: &str, error: &toml::de::Error) -> String {
    let message = without_values(error.message())
        .split_whitespace()
        .collect::<Vec<_>>()
        .join(" ");
    let Some(span) = error.span() else { return message };
    let number = text.get(..span.start).unwrap_or(text).matches('\n').count();
    let path = path_at(text, number);
    format!(
        "line {}: {path}{}{message}",
        number + 1,
        if path.is_empty() { "" } else { ": " }
    )
}

/// The part of a deserializer's message that says what is expected. The value that it found is left out, because it may
/// be a password.
fn without_values(message: &str) -> &str {
    if let Some(key) = message.strip_prefix("unknown field `") {
        let is_name = key
            .split('`')
            .next()
            .is_some_and(|key| is_path(&key.to_ascii_lowercase()));
        return if is_name { message } else { "unknown setting" };
    }
    let repeats_value = ["invalid type:", "invalid value:", "unknown variant ", "invalid length "]
        .iter()
        .any(|start| message.starts_with(start));
    match message.rfind(", expected ") {
        Some(at) if repeats_value => &message[at + 2..],
        None if repeats_value => "is not a value of this setting",
        Some(_) | None => message,
    }
}

/// Path of the key in a line, counted from 0, or of the table that begins there. Empty if the line has no key.
fn path_at(text: &str, number: usize) -> String {
    let mut path = "";
    for line in text.lines().take(number + 1).map(str::trim) {
        if let Some(table) = line.strip_prefix('[') {
            path = table.split(']').next().unwrap_or(table);
        }
    }
    let path = if is_path(path) { path } else { "" };
    let line = text.lines().nth(number).unwrap_or_default();
    match line.split_once('=').map(|(key, _)| key.trim()) {
        Some(key) if !is_path(key) => path.to_owned(),
        Some(key) if path.is_empty() => key.to_owned(),
        Some(key) => format!("{path}.{key}"),
        None => path.to_owned(),
    }
}

/// Whether a text is the path of a setting. The text before an equals sign in a file that is not TOML may be a secret.
fn is_path(text: &str) -> bool {
    (1..=PATH_LEN_MAX).contains(&text.len())
        && text
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"._-".contains(&byte))
}

/// An invalid setting.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SettingError {
    /// Its path, such as `limits.head_bytes_max`.
    pub field: String,
    /// The problem, and the expected value.
    pub problem: String,
}

impl SettingError {
    #[must_use]
    pub fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self {
            field: field.into(),
            problem: problem.into(),
        }
    }
}

impl fmt::Display for SettingError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.field, self.problem)
    }
}

impl std::error::Error for SettingError {}

/// Why the configuration cannot be used. Every message is one line.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read, or is too large.
    #[error("the configuration file {} can't be read: {source}", path.display())]
    Unreadable { path: PathBuf, source: std::io::Error },
    /// The file is not TOML, or has an unknown key or a value of the wrong type.
    #[error("{}: {problem}", path.display())]
    Invalid { path: PathBuf, problem: String },
    /// What nodes share is not a configuration, or has a setting of one node.
    #[error("the configuration from source.urls: {problem}")]
    Shared { problem: String },
    /// Nothing was read from `source.urls`, now or before.
    #[error("no configuration: {problem}, and the data directory has none from an earlier start")]
    Away { problem: String },
    /// A setting is out of its bounds, or contradicts another.
    #[error(transparent)]
    Setting(#[from] SettingError),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_survive_a_file() {
        let text = toml::to_string(&Config::default()).unwrap();

        assert_eq!(Config::from_toml(&text), Ok(Config::default()));
        assert_eq!(Config::default().validate(), Ok(()));
        assert_eq!(Config::from_toml(""), Ok(Config::default()));
    }

    #[test]
    fn setting_of_the_file_that_is_out_of_bounds_is_named_with_its_line() {
        let home = tempfile::tempdir().unwrap();
        let path = home.path().join("seawall.toml");
        std::fs::write(&path, "[server]\n\n[limits]\n# few\nhead_bytes_max = 1\n").unwrap();
        let error = Config::from_file(&path).unwrap().validate().unwrap_err();

        let located = Config::locate(error.clone(), &path).to_string();
        assert_eq!(located, format!("{}: line 5: {error}", path.display()));

        let of_a_flag = SettingError::new("limits.head_bytes_max", "is not what the file says");
        assert_eq!(
            Config::locate(of_a_flag.clone(), &path).to_string(),
            of_a_flag.to_string()
        );
        let elsewhere = home.path().join("none.toml");
        assert_eq!(Config::locate(error.clone(), &elsewhere).to_string(), error.to_string());
    }

    #[test]
    fn environment_overrides_the_file_and_the_file_what_nodes_share() {
        let home = tempfile::tempdir().unwrap();
        let file = home.path().join("seawall.toml");
        std::fs::write(&file, "[drain]\nrate_per_second = 2\nannounce_seconds = 2\n").unwrap();
        let shared = "[drain]\nrate_per_second = 1\nannounce_seconds = 1\ndeadline_seconds = 100\n";
        let variables = [("SEAWALL_DRAIN__RATE_PER_SECOND".into(), "3".into())];

        let config = Config::from_layers(Some(shared), Some(&file), variables).unwrap();

        assert_eq!(config.drain.rate_per_second, 3);
        assert_eq!(config.drain.announce_seconds, 2);
        assert_eq!(config.drain.deadline_seconds, 100);
        let none = Config::from_layers(None, None, []).unwrap();
        assert_eq!(none, Config::default());
    }

    #[test]
    fn time_is_seconds_or_a_text_with_a_unit() {
        for (text, seconds) in [("30", 30), ("\"30s\"", 30), ("\"5m\"", 300)] {
            let config = Config::from_toml(&format!("[source]\nrefresh = {text}\n")).unwrap();
            assert_eq!(config.source.refresh, seconds);
        }
        for text in ["\"soon\"", "\"100ms\"", "-1", "true"] {
            let problem = Config::from_toml(&format!("[source]\nrefresh = {text}\n")).unwrap_err();
            assert!(
                problem.contains("source.refresh") && problem.contains("seconds"),
                "{problem}"
            );
        }
    }

    #[test]
    fn changes_name_what_differs_and_the_digest_leaves_out_what_is_of_one_node_or_secret() {
        let mut other = Config::default();
        other.server.node = Some("b".into());
        other.ops.listen.set_port(1);
        other.source.urls = vec!["https://a.example/x?token=1".into()];
        assert_eq!(other.digest_hex(), Config::default().digest_hex());
        assert_eq!(
            Config::default().changes(&other).into_iter().collect::<Vec<_>>(),
            ["ops.listen", "server.node", "source.urls"]
        );
        other.database.url = Some("postgres://u:one@h/d".parse().unwrap());
        let digest = other.digest_hex();
        assert_ne!(digest, Config::default().digest_hex());
        other.database.url = Some("postgres://u:other@h/d".parse().unwrap());
        assert_eq!(other.digest_hex(), digest);
        let shown = toml::to_string(&other.without_secrets()).unwrap();
        assert!(!shown.contains("other@") && !shown.contains("token"), "{shown}");
    }

    #[test]
    fn unknown_and_wrong_settings_are_named_in_one_line() {
        for (text, named) in [
            ("[limits]\nhead_byte_max = 1\n", "limits.head_byte_max"),
            ("[limit]\n", "limit"),
            ("x = 1\n", "x"),
            ("[limits]\nhead_bytes_max = \"8 KiB\"\n", "limits.head_bytes_max"),
            ("[server]\nlisten = \"localhost\"\n", "server.listen"),
            ("[limits]\nhead_bytes_max = -1\n", "limits.head_bytes_max"),
            ("[logging]\nformat = \"xml\"\n", "logging.format"),
            ("[limits\n", "line 1"),
        ] {
            let problem = Config::from_toml(text).unwrap_err();

            assert!(problem.contains(named) && !problem.contains('\n'), "{problem}");
        }
    }

    #[test]
    fn what_is_expected_is_said_and_what_was_found_is_not() {
        for (text, problem) in [
            (
                "[limits]\nhead_bytes_max = \"hunter2, expected x\"\n",
                "line 2: limits.head_bytes_max: expected usize",
            ),
            (
                "[logging]\nformat = \"hunter2\"\n",
                "line 2: logging.format: expected one of `auto`, `json`, `human`",
            ),
            ("[database]\n\"hunter2@\" = 1\n", "line 2: database: unknown setting"),
        ] {
            assert_eq!(Config::from_toml(text).unwrap_err(), problem);
        }
    }

    #[test]
    fn figures_out_of_bounds_name_the_path_and_what_is_allowed() {
        let config = Config::from_toml("[limits]\nhead_bytes_max = 1\n").unwrap();

        let error = config.validate().unwrap_err();

        assert_eq!(
            error.to_string(),
            "limits.head_bytes_max: 1 is out of range: 1024 to 65536 bytes are allowed"
        );
    }

    #[test]
    fn ops_address_outside_loopback_needs_consent() {
        let open = Config::from_toml("[ops]\nlisten = \"0.0.0.0:8081\"\n").unwrap();
        let secured =
            Config::from_toml("[ops]\nlisten = \"0.0.0.0:8081\"\ntls_certificate = \"c\"\ntls_key = \"k\"\n").unwrap();
        let meant = Config::from_toml("[ops]\nlisten = \"0.0.0.0:8081\"\ninsecure = true\n").unwrap();

        assert!(open.validate().unwrap_err().to_string().contains("--insecure-ops"));
        assert_eq!(meant.validate(), Ok(()));
        assert_eq!(secured.validate(), Ok(()));
    }

    #[test]
    fn balancers_are_addresses_or_networks_and_at_least_one() {
        for text in ["protocol = true", "forwarded_for = true", "trusted = [\"10.0.0.0/40\"]"] {
            let config = Config::from_toml(&format!("[proxy]\n{text}\n")).unwrap();

            assert_eq!(config.validate().unwrap_err().field, "proxy.trusted", "{text}");
        }
    }

    #[test]
    fn tls_settings_need_each_other() {
        for (text, named) in [
            ("certificate = \"c\"", "tls.key"),
            ("key = \"k\"", "tls.certificate"),
            ("client_ca = \"a\"", "tls.client_ca"),
            ("certificate = \"c\"\nkey = \"k\"\nclient_crl = \"l\"", "tls.client_crl"),
            ("client_certificate_required = true", "tls.client_certificate_required"),
        ] {
            let config = Config::from_toml(&format!("[tls]\n{text}\n")).unwrap();

            assert_eq!(config.validate().unwrap_err().field, named);
        }
    }
}
