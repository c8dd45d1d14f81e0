//! `seawall serve`: reads settings from flags, environment and file, and runs a gateway until a signal.

use std::{net::SocketAddr, path::PathBuf, time::Duration};

use clap::Args;

use super::{Common, Failure};
use crate::{
    fleet::shared_config::{Fetched, SharedConfig},
    runtime::{
        config::{Config, ConfigError, DatabaseUrl, LogFormat, SettingError, listen},
        telemetry,
    },
    serve::{self, StartError},
    tasks::configuration::Reloads,
};

/// Maximum time for blocking work after the gateway has stopped.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(1);

/// Settings of a gateway; a flag wins over the environment, that over the file, that over the default.
#[derive(Clone, Debug, Args)]
pub struct ServeArgs {
    /// Configuration file (TOML); docs/CONFIG.md tells its settings
    #[arg(long, env = "SEAWALL_CONFIG", value_name = "FILE")]
    config: Option<PathBuf>,
    /// postgres://… or sqlite:PATH [default: seawall.db in the data directory]
    #[arg(long, env = "SEAWALL_DATABASE", value_name = "URL", hide_env_values = true)]
    database: Option<String>,
    /// Address for devices [default: 127.0.0.1:8080]
    #[arg(long, env = "SEAWALL_LISTEN", value_name = "ADDR", value_parser = listen::parse)]
    listen: Option<SocketAddr>,
    /// Address for the API, metrics and health checks [default: 127.0.0.1:8081]
    #[arg(long, env = "SEAWALL_OPS_LISTEN", value_name = "ADDR", value_parser = listen::parse)]
    ops_listen: Option<SocketAddr>,
    /// Certificate for devices (PEM, its chain behind it) [default: plain TCP]
    #[arg(long, env = "SEAWALL_TLS_CERT", value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// Key of the certificate (PEM)
    #[arg(long, env = "SEAWALL_TLS_KEY", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// Allow an API address outside loopback without TLS, although tokens then cross the network in clear text
    #[arg(long)]
    insecure_ops: bool,
    /// Memory to plan with: bytes, or 512M, 2G [default: what the cgroup allows, else what the machine has]
    #[arg(long, env = "SEAWALL_MAX_MEMORY", value_name = "BYTES", value_parser = bytes)]
    max_memory: Option<u64>,
    /// How log lines are written
    #[arg(long, env = "SEAWALL_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    /// Log level: a level, or directives such as info,seawall_gateway::lookup=debug
    #[arg(long, env = "SEAWALL_LOG_LEVEL", value_name = "LEVEL")]
    log_level: Option<String>,
}

impl ServeArgs {
    /// Whether the database's password is in the list of processes, which every user of the machine can read.
    fn shows_password(&self) -> bool {
        let is_from_environment = std::env::var("SEAWALL_DATABASE").ok() == self.database;
        let url = self.database.as_deref().and_then(|url| url.parse::<DatabaseUrl>().ok());
        !is_from_environment && url.is_some_and(|url| url.has_password())
    }

    /// Reads what nodes share, the file and the environment, applies the flags, and validates the result.
    ///
    /// # Errors
    /// A setting is wrong; the message is one line that names it.
    fn load(&self, data_dir: Option<&PathBuf>, shared: Option<&str>) -> Result<Config, ConfigError> {
        let mut config = Config::from_layers(shared, self.config.as_deref(), std::env::vars_os())?;
        if let Some(url) = &self.database {
            config.database.url = Some(
                url.parse()
                    .map_err(|error| SettingError::new("--database", format!("{error}")))?,
            );
        }
        let Self {
            listen,
            ops_listen,
            tls_cert,
            tls_key,
            max_memory,
            log_format,
            log_level,
            ..
        } = self.clone();
        replace(&mut config.server.listen, listen);
        replace(&mut config.server.data_dir, data_dir.cloned());
        replace(&mut config.server.max_memory_bytes, max_memory);
        replace(&mut config.ops.listen, ops_listen);
        config.tls.certificate = tls_cert.or(config.tls.certificate);
        config.tls.key = tls_key.or(config.tls.key);
        config.ops.insecure |= self.insecure_ops;
        replace(&mut config.logging.format, log_format);
        replace(&mut config.logging.level, log_level);
        match (config.validate(), &self.config) {
            (Ok(()), _) => Ok(config),
            (Err(error), Some(file)) => Err(Config::locate(error, file)),
            (Err(error), None) => Err(error.into()),
        }
    }
}

impl ServeArgs {
    /// The configuration with what nodes share as an earlier start kept it: nothing is fetched.
    ///
    /// # Errors
    /// A setting is wrong; the message is one line that names it.
    pub fn load_kept(&self, data_dir: Option<&PathBuf>) -> Result<Config, ConfigError> {
        let config = self.load(data_dir, None)?;
        let shared = SharedConfig::open(&config.source, &config.server.data_dir);
        match shared.as_ref().and_then(SharedConfig::text) {
            Some(text) => self.load(data_dir, Some(text)),
            None => Ok(config),
        }
    }

    /// The configuration of a start, what it is read from again, and what its log should say of that.
    ///
    /// # Errors
    /// A setting is wrong, or what nodes share was never read. The message is one line.
    fn load_fetched(self, data_dir: Option<PathBuf>) -> Result<(Config, Reloads, Vec<Fetched>), ConfigError> {
        let mut config = self.load(data_dir.as_ref(), None)?;
        let mut shared = SharedConfig::open(&config.source, &config.server.data_dir);
        let mut failed = Vec::new();
        let mut is_confirmed = shared.is_none();
        if let Some(shared) = &mut shared {
            failed = shared.fetch(true, |text| self.load(data_dir.as_ref(), Some(text)).map(drop));
            is_confirmed = failed.last().is_some_and(|fetched| fetched.outcome.is_contact());
            failed.retain(|fetched| !fetched.outcome.is_contact());
            let Some(text) = shared.text() else {
                return Err(ConfigError::Away {
                    problem: failed.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "),
                });
            };
            config = self.load(data_dir.as_ref(), Some(text))?;
        }
        let file = self.config.clone();
        let load = move |text: Option<&str>| self.load(data_dir.as_ref(), text);
        let reloads = Reloads::new(Box::new(load), file, shared, is_confirmed);
        Ok((config, reloads, failed))
    }
}

/// A number of bytes, or one of KiB, MiB, GiB or TiB: `1073741824`, `1048576K`, `1024M`, `1G`, `1GiB`.
fn bytes(text: &str) -> Result<u64, &'static str> {
    let wrong = "expected a number of bytes, or one with K, M, G or T, as in 512M";
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wrong),
    };
    let number: u64 = number.parse().map_err(|_| wrong)?;
    number.checked_mul(1 << shift).ok_or(wrong)
}

fn replace<T>(setting: &mut T, given: Option<T>) {
    if let Some(given) = given {
        *setting = given;
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        if matches!(error, ConfigError::Away { .. }) {
            Self::failed(error)
        } else {
            Self::WrongUse(error.to_string())
        }
    }
}

impl From<StartError> for Failure {
    fn from(error: StartError) -> Self {
        if error.is_setting() {
            Self::WrongUse(error.to_string())
        } else {
            Self::failed(error)
        }
    }
}

pub fn run(common: &Common, args: ServeArgs) -> Result<(), Failure> {
    let shows_password = args.shows_password();
    let (config, reloads, failed) = args.load_fetched(common.data_dir.clone())?;
    let unknown = super::unknown_variables();
    if let Some((name, meant)) = unknown.iter().find_map(|one| Some((&one.name, one.meant.as_ref()?))) {
        return Err(Failure::WrongUse(format!(
            "environment variable {name} is not a setting: {meant} is meant?"
        )));
    }
    let log = telemetry::start(&config.logging, &serve::node_name(&config))?;
    for one in unknown {
        tracing::warn!(name = one.name, "unknown environment variable: not a setting");
    }
    for fetched in failed {
        tracing::warn!(%fetched, "shared configuration not read from here");
    }
    if shows_password {
        tracing::warn!(
            "database password in the list of processes: give the address in SEAWALL_DATABASE or in the configuration file"
        );
    }
    let runtime = runtime()?;
    let outcome = runtime.block_on(serve::until_signal(config, reloads));
    // A blocked thread, such as a write to a disk that hangs, must not keep the process.
    runtime.shutdown_timeout(SHUTDOWN_TIMEOUT);
    let Err(error) = outcome else { return Ok(()) };
    let failure = Failure::from(error);
    // A JSON log has JSON lines only.
    if log.is_json() && tracing::enabled!(tracing::Level::ERROR) {
        tracing::error!(error = failure.text(), "gateway failed");
        return Err(Failure::Logged(failure.exit_status()));
    }
    // The last lines of the log precede the reason of the exit.
    drop(log);
    Err(failure)
}

/// Returns a runtime for a command that uses sockets or a database.
pub fn runtime() -> Result<tokio::runtime::Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .thread_name("seawall")
        .build()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_bytes_or_a_number_with_a_unit() {
        for (text, value) in [
            ("0", 0),
            ("1073741824", 1 << 30),
            ("1048576k", 1 << 30),
            ("1024 MiB", 1 << 30),
            ("1G", 1 << 30),
            ("1GB", 1 << 30),
            ("2t", 2 << 40),
        ] {
            assert_eq!(bytes(text), Ok(value), "{text}");
        }
        for text in ["", "G", "lots", "1.5G", "-1", "1X", "99999999999999T"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
