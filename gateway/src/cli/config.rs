//! `seawall config`: the settings of a gateway, without starting one.

use clap::Subcommand;

use super::{Common, Failure, ServeArgs, table};
use crate::runtime::config::Config;

#[derive(Debug, Subcommand)]
pub enum ConfigVerb {
    /// Print every setting with its default
    Default,
    /// Check the configuration of `serve` with these options, and print every setting without passwords
    Show(Box<ServeArgs>),
}

pub fn run(common: &Common, verb: ConfigVerb) -> Result<(), Failure> {
    let config = match verb {
        ConfigVerb::Default => Config::default(),
        ConfigVerb::Show(args) => args.load_kept(common.data_dir.as_ref())?.without_secrets(),
    };
    if common.json {
        let json = serde_json::to_value(&config).map_err(Failure::failed)?;
        return table::print(&table::json(&json));
    }
    table::print(&toml::to_string(&config).map_err(Failure::failed)?)
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

        let text = toml::to_string(&config.without_secrets()).unwrap();

        assert!(text.contains("db.example:6432") && !text.contains("hunter2"), "{text}");
    }

    #[test]
    fn address_of_the_webhook_is_shown_without_its_token() {
        for url in [
            "https://hooks.example:8443/services/hunter2",
            "https://u:hunter2@hooks.example:8443/?token=hunter2",
            "https://hooks.example:8443?hunter2",
        ] {
            let mut config = Config::default();
            config.webhook.url = Some(url.to_owned());

            let shown = config.without_secrets().webhook.url;

            assert_eq!(shown.as_deref(), Some("https://hooks.example:8443/…"));
        }
    }
}
