//! Log lines of the binary, their form, and changes of the level.

use std::{
    collections::BTreeSet,
    fmt, fs,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    path::Path,
};

use firmware_sim::connection::{Connection, DeviceConfig};
use rustix::process::Signal;
use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::Value;

use super::{STOP_MAX, assert_refused, done, json};
use crate::harness::{
    process::{GatewayProcess, run, seawall},
    wait::eventually_blocking,
};

/// Number of devices that connect at once.
const DEVICES: usize = 50;

/// A value whose objects have no duplicate keys.
struct Strict;

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Looker;

        impl<'de> Visitor<'de> for Looker {
            type Value = Strict;

            fn expecting(&self, form: &mut fmt::Formatter<'_>) -> fmt::Result {
                form.write_str("JSON")
            }

            fn visit_bool<E>(self, _: bool) -> Result<Strict, E> {
                Ok(Strict)
            }

            fn visit_i64<E>(self, _: i64) -> Result<Strict, E> {
                Ok(Strict)
            }

            fn visit_u64<E>(self, _: u64) -> Result<Strict, E> {
                Ok(Strict)
            }

            fn visit_f64<E>(self, _: f64) -> Result<Strict, E> {
                Ok(Strict)
            }

            fn visit_str<E>(self, _: &str) -> Result<Strict, E> {
                Ok(Strict)
            }

            fn visit_unit<E>(self) -> Result<Strict, E> {
                Ok(Strict)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Strict, A::Error> {
                while items.next_element::<Strict>()?.is_some() {}
                Ok(Strict)
            }

            fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Strict, A::Error> {
                let mut keys = BTreeSet::new();
                while let Some((key, Strict)) = entries.next_entry::<String, _>()? {
                    if let Some(twice) = keys.replace(key) {
                        return Err(A::Error::custom(format!("key {twice} twice")));
                    }
                }
                Ok(Strict)
            }
        }

        deserializer.deserialize_any(Looker)
    }
}

/// Lines of the log, each an object without duplicate keys, with the four keys that all lines have.
#[track_caller]
fn lines(gateway: &GatewayProcess) -> Vec<Value> {
    let log = gateway.log().unwrap();
    let read = |line: &str| {
        if let Err(error) = serde_json::from_str::<Strict>(line) {
            panic!("{error}: {line}");
        }
        let json: Value = serde_json::from_str(line).unwrap();
        for key in ["timestamp", "level", "target", "message"] {
            assert!(json[key].is_string(), "no {key}: {line}");
        }
        json
    };
    // The last line may be incomplete.
    let whole = log.rfind('\n').map_or("", |end| &log[..end]);
    whole.lines().map(read).collect()
}

fn debug_lines(log: &str) -> usize {
    log.matches(r#""level":"DEBUG""#).count()
}

/// A connection that is refused, which logs a line at DEBUG.
fn be_refused(gateway: &GatewayProcess) {
    let mut stream = TcpStream::connect(gateway.addresses.devices).unwrap();
    stream
        .write_all(b"GET /v1/connect HTTP/1.1\r\nHost: x\r\n\r\n")
        .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 4"), "{answer}");
}

fn configured(folder: &Path, level: &str) -> String {
    let file = folder.join("seawall.toml");
    fs::write(&file, format!("[logging]\nlevel = \"{level}\"\n")).unwrap();
    file.to_str().unwrap().to_owned()
}

#[test]
fn log_level_is_read_again_at_sighup() {
    let home = tempfile::tempdir().unwrap();
    let file = configured(home.path(), "info");
    let gateway = GatewayProcess::start(&["--config", &file]).unwrap();
    be_refused(&gateway);
    let before = gateway.log().unwrap();

    configured(home.path(), "debug");
    gateway.signal(Signal::HUP).unwrap();
    eventually_blocking(|| gateway.has_logged("log level changed"));
    be_refused(&gateway);

    assert_eq!(debug_lines(&before), 0, "{before}");
    eventually_blocking(|| debug_lines(&gateway.log().unwrap()) > 0);
    let changed = lines(&gateway);
    let changed = changed.iter().find(|line| line["message"] == "log level changed");
    let changed = changed.unwrap();
    assert_eq!((&changed["from"], &changed["to"]), (&"info".into(), &"debug".into()));
    fs::write(&file, "[logging]\nlevle = 1\n").unwrap();
    gateway.signal(Signal::HUP).unwrap();
    eventually_blocking(|| gateway.has_logged("levle"));
    assert!(run(&mut gateway.operator(&["nodes"])).unwrap().status.success());
}

#[test]
fn sighup_that_changes_no_level_says_so() {
    let home = tempfile::tempdir().unwrap();
    let file = configured(home.path(), "debug");
    let without_file = GatewayProcess::start(&[]).unwrap();
    let with_flag = GatewayProcess::start(&["--config", &file, "--log-level", "info"]).unwrap();

    for gateway in [without_file, with_flag] {
        gateway.signal(Signal::HUP).unwrap();

        eventually_blocking(|| gateway.has_logged("log level unchanged"));
        assert!(!gateway.log().unwrap().contains("log level changed"));
        assert_eq!(lines(&gateway).last().unwrap()["to"], "info");
    }
}

#[test]
fn operator_changes_the_log_level_until_sighup() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let node = || json(&run(&mut gateway.operator(&["nodes", "--json"])).unwrap())["items"][0].clone();

    assert_eq!(node()["log_level"], "info");
    let told = done(&mut gateway.operator(&["log-level", "info,seawall_gateway=debug"]));
    be_refused(&gateway);
    eventually_blocking(|| debug_lines(&gateway.log().unwrap()) > 0);
    let during = node();
    let again = json(&run(&mut gateway.operator(&["log-level", "info,seawall_gateway=debug", "--json"])).unwrap());
    gateway.signal(Signal::HUP).unwrap();
    eventually_blocking(|| gateway.log().unwrap().matches("log level changed").count() == 2);

    assert_eq!(told, "log level info,seawall_gateway=debug, before: info\n");
    assert_eq!(during["log_level"], "info,seawall_gateway=debug");
    assert_eq!(
        again,
        serde_json::json!({"level": "info,seawall_gateway=debug", "before": "info,seawall_gateway=debug"})
    );
    assert_eq!(node()["log_level"], "info");
    let audit = json(&run(&mut gateway.operator(&["audit", "--json"])).unwrap());
    let records: Vec<&Value> = audit["items"].as_array().unwrap().iter().collect();
    assert_eq!(records.len(), 1, "no record without a change: {audit}");
    let record = records[0];
    assert_eq!(
        (
            &record["action"],
            &record["subject"],
            &record["before"],
            &record["after"]
        ),
        (
            &"node.log_level".into(),
            &"node".into(),
            &serde_json::json!({"level": "info"}),
            &serde_json::json!({"level": "info,seawall_gateway=debug"})
        )
    );
}

#[test]
fn log_level_that_is_none_is_refused_and_changes_nothing() {
    let gateway = GatewayProcess::start(&[]).unwrap();

    for level in ["loud", "a=b=c", "", "info,hyper", &"x".repeat(2_000)] {
        let refused = run(&mut gateway.operator(&["log-level", level])).unwrap();

        assert_refused(&refused, 2, &["422", "invalid", "level: "]);
    }
    let nodes = json(&run(&mut gateway.operator(&["nodes", "--json"])).unwrap());
    assert_eq!(nodes["items"][0]["log_level"], "info");
}

#[test]
fn change_of_the_log_level_is_heard_at_whichever_level_hears_it() {
    let gateway = GatewayProcess::start(&[]).unwrap();

    done(&mut gateway.operator(&["log-level", "error"]));
    eventually_blocking(|| gateway.log().unwrap().matches("log level changed").count() == 1);
    done(&mut gateway.operator(&["log-level", "info"]));
    eventually_blocking(|| gateway.log().unwrap().matches("log level changed").count() == 2);
}

/// Devices that were just registered, with this firmware version.
fn fleet(gateway: &GatewayProcess, folder: &Path, version: &str) -> Vec<DeviceConfig> {
    let fleet = folder.join("fleet.csv");
    let out = fleet.to_str().unwrap();
    done(&mut gateway.operator(&["devices", "seed", "--count", &DEVICES.to_string(), "--out", out]));
    let device = |line: &str| {
        let (id, secret) = line.split_once(',').unwrap();
        DeviceConfig::new(id.parse().unwrap(), secret).firmware(version)
    };
    fs::read_to_string(&fleet)
        .unwrap()
        .lines()
        .skip(1)
        .map(device)
        .collect()
}

async fn connect(gateway: &GatewayProcess, device: &DeviceConfig) -> Connection {
    let url = format!("ws://{}", gateway.addresses.devices);
    Connection::open(&url, device).await.unwrap()
}

#[tokio::test]
async fn eviction_begins_once_for_each_change_of_the_rules() {
    let home = tempfile::tempdir().unwrap();
    let gateway = GatewayProcess::start(&[]).unwrap();
    let mut sessions = Vec::new();
    for device in fleet(&gateway, home.path(), "3.8.0") {
        sessions.push(connect(&gateway, &device).await);
    }
    let begins = |log: &str| {
        let evictions = log.lines().filter(|line| line.contains("eviction of blocked sessions"));
        evictions.filter(|line| line.contains("started")).count()
    };

    let block = ["rules", "block", "=3.8.0", "--reason", "storms", "--confirm", "--evict"];
    done(&mut gateway.operator(&block));
    eventually_blocking(|| begins(&gateway.log().unwrap()) > 0);
    done(&mut gateway.operator(&["rules", "block", "=9.9.9", "--reason", "another", "--confirm"]));

    eventually_blocking(|| gateway.metric("seawall_sessions ").unwrap() == 0);
    // Once for each change, and once more for requests that came meanwhile.
    let log = gateway.log().unwrap();
    assert!((1..=3).contains(&begins(&log)), "{log}");
    drop(sessions);
}

/// Sessions of registered devices, and attempts of unknown devices, with a wrong secret, and without HTTP.
async fn all_kinds_of_devices(gateway: &GatewayProcess, folder: &Path) -> Vec<Connection> {
    let url = format!("ws://{}", gateway.addresses.devices);
    let mut sessions = Vec::new();
    for device in fleet(gateway, folder, "3.8.0-b2") {
        let wrong = Connection::open(&url, &DeviceConfig::new(device.id, "not-the-secret-of-anybody")).await;
        assert!(wrong.is_err());
        sessions.push(connect(gateway, &device).await);
        be_refused(gateway);
        let mut broken = TcpStream::connect(gateway.addresses.devices).unwrap();
        broken.write_all(b"\x16\x03\x01 no HTTP\r\n\r\n").unwrap();
        broken.shutdown(Shutdown::Write).unwrap();
    }
    sessions
}

#[tokio::test]
async fn every_line_is_a_json_object_without_a_key_twice() {
    let home = tempfile::tempdir().unwrap();
    let mut gateway = GatewayProcess::start(&["--log-level", "trace"]).unwrap();

    let sessions = all_kinds_of_devices(&gateway, home.path()).await;
    for verb in [
        &[
            "rules",
            "block",
            "=3.8.0-b2",
            "--reason",
            "storms",
            "--confirm",
            "--evict",
        ][..],
        &["rules", "unblock", "=3.8.0-b2"],
        &["drain", "start", "--deadline", "1m"],
        &["drain", "cancel"],
        &["log-level", "debug"],
        &["log-level", "trace"],
    ] {
        done(&mut gateway.operator(verb));
    }
    gateway.signal(Signal::HUP).unwrap();
    eventually_blocking(|| gateway.has_logged("log level unchanged"));
    drop(sessions);
    gateway.signal(Signal::TERM).unwrap();
    gateway.wait(STOP_MAX).unwrap();

    let levels: BTreeSet<String> = lines(&gateway).iter().map(|line| line["level"].to_string()).collect();
    assert!(
        levels.contains("\"DEBUG\"") && levels.contains("\"INFO\""),
        "{levels:?}"
    );
}

#[tokio::test]
async fn devices_cause_no_line_above_debug() {
    let home = tempfile::tempdir().unwrap();
    let gateway = GatewayProcess::start(&["--log-level", "debug"]).unwrap();

    let sessions = all_kinds_of_devices(&gateway, home.path()).await;
    drop(sessions);
    eventually_blocking(|| gateway.metric("seawall_sessions ").unwrap() == 0);

    let lines = lines(&gateway);
    let imported = lines.iter().position(|line| line["message"] == "devices imported");
    let of_devices = &lines[imported.unwrap() + 1..];
    assert!(of_devices.len() >= 3 * DEVICES, "{}", of_devices.len());
    // Alarms are about the machine, which others use as well, and changes are an operator's.
    let above: Vec<&Value> = of_devices
        .iter()
        .filter(|line| line["level"] != "DEBUG" && line["alarm"].is_null() && line["message"] != "API change")
        .collect();
    assert!(above.is_empty(), "{above:?}");
}

#[test]
fn human_lines_are_text_without_colours_where_nobody_watches() {
    let gateway = GatewayProcess::start(&["--log-format", "human"]).unwrap();

    eventually_blocking(|| gateway.has_logged("listening"));

    let log = gateway.log().unwrap();
    let listening = log.lines().find(|line| line.contains("listening")).unwrap();
    assert!(listening.contains("INFO") && listening.contains("ops="), "{listening}");
    assert!(log.lines().all(|line| !line.starts_with('{')), "{log}");
    assert!(!log.contains('\u{1b}'), "{log:?}");
}

#[test]
fn reason_why_a_gateway_ends_has_the_form_of_its_log() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let serve = |format: &str| {
        let home = tempfile::tempdir().unwrap();
        let args = [
            "serve",
            "--listen",
            &address,
            "--ops-listen",
            "127.0.0.1:0",
            "--log-format",
            format,
        ];
        let output = run(seawall().current_dir(home.path()).args(args)).unwrap();
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };

    let (json, human) = (serve("json"), serve("human"));

    for line in json.lines() {
        assert!(serde_json::from_str::<serde_json::Value>(line).is_ok(), "{line}");
    }
    assert!(json.lines().last().unwrap().contains(&address), "{json}");
    let last = human.lines().last().unwrap();
    assert!(last.starts_with("error: ") && last.contains(&address), "{human}");
}
