//! `seawall config`: the settings of a gateway, without starting one.

use clap::Subcommand;

use super::{Common, Failure, ServeArgs, table};
use crate::config::Config;

#[derive(Debug, Subcommand)]
pub enum ConfigVerb {
    /// Print every setting with its default
    Default,
    /// Check the configuration of `serve` with these options, and print every setting; passwords are left out
    Show(Box<ServeArgs>),
}

pub fn run(common: &Common, verb: ConfigVerb) -> Result<(), Failure> {
    let config = match verb {
        ConfigVerb::Default => Config::default(),
        ConfigVerb::Show(args) => shown(args.load(common.data_dir.as_ref())?),
    };
    if common.json {
        let json = serde_json::to_value(&config).map_err(Failure::failed)?;
        return table::print(&table::json(&json));
    }
    table::print(&toml::to_string(&config).map_err(Failure::failed)?)
}

/// The configuration in use, with a database URL that anybody may read.
fn shown(mut config: Config) -> Config {
    // What `Display` leaves out is the password.
    config.database.url = config.database_url().to_string().parse().ok();
    config
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_a_valid_configuration() {
        let text = toml::to_string(&Config::default()).unwrap();

        assert_eq!(Config::from_toml(&text).unwrap(), Config::default());
    }

    #[test]
    fn password_of_the_database_is_not_shown() {
        let config = Config::from_toml("[database]\nurl = \"postgres://u:hunter2@db.example:6432/seawall\"\n").unwrap();

        let text = toml::to_string(&shown(config)).unwrap();

        assert!(text.contains("db.example:6432") && !text.contains("hunter2"), "{text}");
    }
}
