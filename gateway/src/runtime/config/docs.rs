//! The text of docs/CONFIG.md, generated from the sections.

use std::fmt::Write;

use super::{
    BreakerSettings, Config, Database, Drain, Limits, Logging, Ops, PresenceSettings, ProxySettings, ResumeTokens,
    RulesSync, Server, Session, SourceSettings, TlsSettings, WebhookSettings,
    section::{Field, Section},
};

const HEAD: &str = "\
# Configuration

<!-- Generated from gateway/src/runtime/config; `UPDATE=1 cargo test -p seawall-gateway --lib config` writes it again. -->

`seawall serve --config FILE` reads a TOML file with the sections below. `SEAWALL_CONFIG` names one as well.
Every setting has a default for production, so an empty file, or none, is a valid configuration.

- A flag overrides the environment, the environment overrides the file, the file overrides what nodes share (`[source]`), and that overrides the default.
- Every setting has a variable: `SEAWALL_`, the section, two underscores and the key, as in `SEAWALL_LIMITS__HEAD_BYTES_MAX=16384`. Values are as in the file; a text needs no quotes. With `_FILE` behind it, it names a file with the value, such as a mounted secret: `SEAWALL_DATABASE__URL_FILE=/run/secrets/database`. The short names below, such as `SEAWALL_LISTEN`, override it.
- A setting that is unknown, of the wrong kind or out of its bounds stops the start with one line that names it, exit 2.
- `seawall doctor` checks a configuration without starting anything.
- A running gateway reads the configuration again at SIGHUP, and within ten seconds of a change of its file. It also does if a URL of `[source]` has a new one. It uses at once `logging.level`, `[drain]`, `breaker.mode`, `admission.lookups_per_second_max` and `admission.keys_in_flight_max`, and reads the files of certificates and keys again at SIGHUP. Other changed settings wait for a restart: the log and `config.restart_needed` of `GET /node` name them. A configuration that cannot be used changes nothing.

```toml
[server]
listen = \"0.0.0.0:8080\"
data_dir = \"/var/lib/seawall\"

[database]
url = \"postgres://seawall:secret@db.example/seawall?sslmode=verify-full&sslrootcert=/etc/seawall/db-ca.pem\"

[identity]
device_header = \"X-Device-Id\"
firmware_query = \"fw\"
```
";

/// The whole text of docs/CONFIG.md.
#[must_use]
pub fn markdown() -> String {
    let defaults = toml::Table::try_from(Config::default()).unwrap_or_default();
    let mut text = HEAD.to_owned();
    text.push_str("\nSections:");
    for (index, section) in sections().iter().enumerate() {
        let separator = if index == 0 { "" } else { " ·" };
        // Writing to a text never fails.
        let _ = write!(text, "{separator} [`[{0}]`](#{0})", section.name);
    }
    text.push('\n');
    for section in sections() {
        let values = defaults.get(section.name).and_then(toml::Value::as_table);
        // Writing to a text never fails.
        let _ = write!(
            text,
            "\n## `[{}]`\n\n{}\n\n| setting | default | allowed | |\n|---|---|---|---|\n",
            section.name, section.text
        );
        for field in &section.fields {
            let default = values.and_then(|values| values.get(field.name));
            let _ = writeln!(
                text,
                "| `{}` | {} | {} | {} |",
                field.name,
                default.map_or_else(|| "not given".to_owned(), |value| shown(value, field.unit)),
                allowed(field),
                field.text.replace('|', "\\|")
            );
        }
    }
    text
}

/// Every section, in the order of [`Config`].
fn sections() -> Vec<Section> {
    vec![
        SourceSettings::describe(),
        Server::describe(),
        TlsSettings::describe(),
        ProxySettings::describe(),
        Ops::describe(),
        Database::describe(),
        identity(),
        admission(),
        Limits::describe(),
        Session::describe(),
        PresenceSettings::describe(),
        ResumeTokens::describe(),
        RulesSync::describe(),
        BreakerSettings::describe(),
        Drain::describe(),
        WebhookSettings::describe(),
        Logging::describe(),
    ]
}

/// Whether a section has a setting of this name.
#[must_use]
pub fn is_setting(section: &str, key: &str) -> bool {
    let has_key = |one: &Section| one.name == section && one.fields.iter().any(|field| field.name == key);
    sections().iter().any(has_key)
}

fn shown(value: &toml::Value, unit: &str) -> String {
    if unit.is_empty() {
        format!("`{value}`")
    } else {
        format!("`{value}` {unit}")
    }
}

fn allowed(field: &Field) -> String {
    field
        .bounds
        .as_ref()
        .map_or_else(String::new, |bounds| format!("{} to {}", bounds.start(), bounds.end()))
}

/// `[identity]` is policy: its struct is in `seawall_proto`, its rows are here.
fn identity() -> Section {
    let field = |name, text: &str| Field {
        name,
        text: text.to_owned(),
        unit: "",
        bounds: None,
    };
    Section {
        name: "identity",
        text: "Names of the headers and query parameters that carry a device's identity, for firmware that cannot be \
               changed. Header names are compared without letter case, query parameters exactly; 1 to 64 bytes."
            .to_owned(),
        fields: vec![
            field("device_header", "Header with the device id."),
            field("device_query", "Query parameter with the device id."),
            field("firmware_header", "Header with the firmware version."),
            field("firmware_query", "Query parameter with the firmware version."),
            field("model_header", "Header with the model."),
            field("model_query", "Query parameter with the model."),
            field("tenant_header", "Header with the tenant that the device claims."),
            field(
                "tenant_query",
                "Query parameter with the tenant that the device claims.",
            ),
            field("resume_header", "Header with the resume token."),
            field(
                "slot_header",
                "Header with the reconnect slot, in requests and refusals.",
            ),
            field(
                "namespace",
                "UUID. Accepts device ids that are not UUIDs: 1 to 64 bytes of printable ASCII. The device is the UUIDv5 of \
                 the text in this namespace, and the API shows both. Use the same on every node, and never change it. Not \
                 given: every id is a UUID.",
            ),
        ],
    }
}

/// `[admission]` is policy as well, and describes its own figures.
fn admission() -> Section {
    let config = Config::default().admission;
    let figures = config.figures().into_iter().map(|figure| Field {
        name: figure.name,
        text: figure.text.to_owned(),
        unit: figure.unit,
        bounds: Some(figure.bounds),
    });
    let weights = Field {
        name: "tenant_weights",
        text:
            "Weight of a tenant in the queue and in the virtual queues of slots, by name, as in `{ big = 10 }`; 1 to \
               1000. Default 1."
                .to_owned(),
        unit: "",
        bounds: None,
    };
    Section {
        name: "admission",
        text: "Limits on lookups in the registry, and on what is remembered for slots.".to_owned(),
        fields: figures.chain([weights]).collect(),
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, fs, path::Path};

    use super::*;

    #[test]
    fn config_page_says_what_the_code_says() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/CONFIG.md");

        if std::env::var_os("UPDATE").is_some() {
            fs::write(&path, markdown()).unwrap();
        }

        let page = fs::read_to_string(&path).unwrap_or_default();
        assert!(
            page == markdown(),
            "docs/CONFIG.md is out of date: run this test with UPDATE=1"
        );
    }

    #[test]
    fn settings_that_a_reload_changes_are_named() {
        for field in Drain::describe().fields {
            assert!(Config::is_reloaded(&format!("drain.{}", field.name)));
        }
        let named = HEAD.split("uses at once").nth(1).unwrap().lines().next().unwrap();
        for section in sections() {
            for field in section.fields {
                let path = format!("{}.{}", section.name, field.name);
                let is_named = named.contains(&format!("`{path}`")) || section.name == "drain";
                assert_eq!(Config::is_reloaded(&path), is_named, "{path}");
            }
        }
    }

    #[test]
    fn every_setting_is_on_the_page() {
        let mut config = Config::default();
        config.server.node = Some("n".into());
        config.database.url = Some("sqlite:x".parse().unwrap());
        for file in [
            &mut config.tls.certificate,
            &mut config.tls.key,
            &mut config.tls.client_ca,
            &mut config.tls.client_crl,
            &mut config.ops.tls_certificate,
            &mut config.ops.tls_key,
            &mut config.webhook.secret_file,
        ] {
            *file = Some("x.pem".into());
        }
        config.webhook.url = Some("https://localhost".into());
        config.identity.namespace = Some(uuid::Uuid::nil());
        config.limits.connections_per_address_max = Some(1);
        config.limits.handshakes_per_second_per_address_max = Some(1);

        let settings: BTreeSet<String> = toml::Table::try_from(config)
            .unwrap()
            .iter()
            .flat_map(|(section, keys)| {
                keys.as_table()
                    .unwrap()
                    .keys()
                    .map(move |key| format!("{section}.{key}"))
            })
            .collect();
        let described: BTreeSet<String> = sections()
            .iter()
            .flat_map(|section| {
                section
                    .fields
                    .iter()
                    .map(|field| format!("{}.{}", section.name, field.name))
            })
            .collect();

        assert_eq!(settings, described);
    }
}
