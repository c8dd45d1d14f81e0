//! Damaged files with secrets: no error, finding or log line repeats a part of them.

use std::{fmt::Write, fs, process::Output};

use rustix::process::Signal;

use super::done;
use crate::harness::{
    authority::Authority,
    process::{GatewayProcess, run, seawall},
    wait::eventually_blocking,
};

/// Number of consecutive bytes of a secret that are a part of it.
const PART_LEN: usize = 8;

/// Asserts that `text` has no part of a secret: neither as it is nor as decimal or hexadecimal numbers.
#[track_caller]
fn assert_silent(text: &str, secret: &str, what: &str) {
    for part in secret.as_bytes().windows(PART_LEN) {
        let plain = String::from_utf8_lossy(part);
        if !plain.bytes().all(|byte| byte.is_ascii_graphic()) || plain.contains("---") {
            continue;
        }
        let decimal = part.iter().map(u8::to_string).collect::<Vec<_>>().join(", ");
        let hexadecimal = part.iter().fold(String::new(), |mut text, byte| {
            write!(text, "{byte:02x}").unwrap();
            text
        });
        for form in [plain.as_ref(), &decimal, &hexadecimal] {
            assert!(!text.to_lowercase().contains(&form.to_lowercase()), "{what}: {text}");
        }
    }
}

fn output_of(output: &Output) -> String {
    [&output.stdout, &output.stderr]
        .map(|bytes| String::from_utf8_lossy(bytes).into_owned())
        .concat()
}

/// Damage to a key by environment variables, secret stores and editors.
fn damaged(key: &str) -> Vec<(&'static str, String)> {
    let body: String = key.lines().filter(|line| !line.starts_with('-')).collect();
    vec![
        ("line ends as two characters", key.replace('\n', "\\n")),
        ("line ends as blanks", key.replace('\n', " ")),
        ("no line ends", key.replace('\n', "")),
        ("one line end", key.replacen('\n', "\\n", 1)),
        ("no last line", key.rsplit_once("-----END").unwrap().0.to_owned()),
        ("other last line", key.replace("-----END PRIVATE", "-----END PUBLIC")),
        ("a character that is not base64", key.replace(&body[20..22], "*!")),
        ("a part is missing", key.replace(&body[30..60], "")),
        ("only the body", body.clone()),
        ("as a certificate", key.replace("PRIVATE KEY", "CERTIFICATE")),
        ("as a revocation list", key.replace("PRIVATE KEY", "X509 CRL")),
        (
            "in an environment file",
            format!("TLS_KEY=\"{}\"\n", key.replace('\n', "\\n")),
        ),
        ("as JSON", format!("{{\"key\": {key:?}}}")),
    ]
}

#[test]
fn damaged_private_key_is_never_repeated_whichever_setting_names_its_file() {
    let mut authority = Authority::new();
    let server = authority.server();
    authority.write_server(&server);
    let key: String = server.key.lines().filter(|line| !line.starts_with('-')).collect();
    let (certificate, good) = (authority.path("gateway.pem"), authority.path("gateway.key"));
    let (ca, bad) = (authority.path("ca.pem"), authority.path("bad.pem"));
    authority.write("ca.pem", &authority.pem());
    let settings = [
        format!("[tls]\ncertificate = {certificate:?}\nkey = {bad:?}\n"),
        format!("[tls]\ncertificate = {bad:?}\nkey = {good:?}\n"),
        format!("[tls]\ncertificate = {certificate:?}\nkey = {good:?}\nclient_ca = {bad:?}\n"),
        format!("[tls]\ncertificate = {certificate:?}\nkey = {good:?}\nclient_ca = {ca:?}\nclient_crl = {bad:?}\n"),
        format!("[ops]\ntls_certificate = {certificate:?}\ntls_key = {bad:?}\n"),
    ];
    for (damage, text) in damaged(&server.key) {
        authority.write("bad.pem", &text);
        let files = settings
            .iter()
            .map(|settings| authority.write("seawall.toml", settings));
        for (place, config) in files.chain([authority.path("bad.pem")]).enumerate() {
            let home = tempfile::tempdir().unwrap();
            for verb in ["serve", "doctor"] {
                let mut command = seawall();
                command
                    .current_dir(home.path())
                    .args([verb, "--url", "http://127.0.0.1:1"]);
                let output = run(command.arg("--config").arg(&config)).unwrap();

                let what = format!("{verb}, key {damage}, setting {place}");
                assert!(!output.status.success(), "{what}");
                assert_silent(&output_of(&output), &key, &what);
            }
        }
    }
}

#[test]
fn damaged_private_key_is_never_repeated_in_log_alarm_and_readiness_after_a_reload() {
    let mut authority = Authority::new();
    let settings = authority.settings();
    let config = authority.write("seawall.toml", &settings);
    let gateway = GatewayProcess::start(&["--config", config.to_str().unwrap()]).unwrap();
    let server = authority.server();
    let key: String = server.key.lines().filter(|line| !line.starts_with('-')).collect();
    authority.write("gateway.key", &server.key.replace('\n', "\\n"));

    gateway.signal(Signal::HUP).unwrap();

    let refused = "seawall_tls_reloads_total{outcome=\"refused\"}";
    eventually_blocking(|| gateway.metric(refused).unwrap() > 0);
    let log = gateway.log().unwrap();
    assert!(log.contains("holds no private key as PEM"), "{log}");
    assert_silent(&log, &key, "log");
    assert_silent(&done(&mut gateway.operator(&["nodes", "--json"])), &key, "node");
}

#[test]
fn damaged_keys_tokens_and_settings_are_never_repeated() {
    const SECRET: &str = "Zm9vYmFyYmF6cXV4MDEyMzQ1Njc4OWFiY2RlZmdoaWo";
    for text in [
        format!("{{\"slots\":[{{\"id\":1,\"secret\":\"{SECRET}*\"}}]}}"),
        format!("{{\"slots\":[{{\"id\":\"{SECRET}\",\"secret\":\"x\"}}]}}"),
        format!("{{\"slots\":[\"{SECRET}\"]}}"),
        format!("{{\"slots\":\"{SECRET}\"}}"),
        format!("{{\"{SECRET}\":1}}"),
        format!("\"{SECRET}\""),
        SECRET.to_owned(),
    ] {
        let home = tempfile::tempdir().unwrap();
        let data = home.path().join("seawall-data");
        fs::create_dir(&data).unwrap();
        fs::write(data.join("keys.json"), &text).unwrap();

        let output = run(seawall().current_dir(home.path()).args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--ops-listen",
            "127.0.0.1:0",
        ]))
        .unwrap();

        assert!(!output.status.success(), "{text}");
        assert!(output_of(&output).contains("keys.json"), "{text}");
        assert_silent(&output_of(&output), SECRET, &text);
    }
    for text in [
        format!("[database]\nurl: postgres://fleet:{SECRET}=@h/db\n"),
        format!("[database]\nurl = postgres://fleet:{SECRET}@h/db\n"),
        format!("[database]\nurl = \"{SECRET}\"\n"),
        format!("[database]\nurl = [\"postgres://fleet:{SECRET}@h/db\"]\n"),
        format!("[database]\n\"postgres://fleet:{SECRET}@h/db\" = 1\n"),
        format!("[database \"{SECRET}\"]\nurl=1\n"),
        format!("[logging]\nformat = \"{SECRET}\"\n"),
        format!("[limits]\nhead_bytes_max = \"{SECRET}\"\n"),
        format!("[server]\nlisten = \"{SECRET}\"\n"),
        format!("database = \"{SECRET}\"\n"),
        format!("{SECRET}==\n"),
        format!("url = \"postgres://fleet:{SECRET}\n"),
    ] {
        let home = tempfile::tempdir().unwrap();
        let config = home.path().join("seawall.toml");
        fs::write(&config, &text).unwrap();

        let output = run(seawall()
            .current_dir(home.path())
            .args([
                "serve",
                "--listen",
                "127.0.0.1:0",
                "--ops-listen",
                "127.0.0.1:0",
                "--config",
            ])
            .arg(&config))
        .unwrap();

        assert_eq!(output.status.code(), Some(2), "{text}");
        assert_silent(&output_of(&output), SECRET, &text);
    }
}

#[test]
fn what_a_command_is_given_in_place_of_a_token_is_never_repeated() {
    const SECRET: &str = "Zm9vYmFyYmF6cXV4MDEyMzQ1Njc4OWFiY2RlZmdoaWo";
    for (name, value) in [
        ("SEAWALL_TOKEN", format!("{SECRET}\n{SECRET}")),
        ("SEAWALL_URL", format!("http://admin:{SECRET}@127.0.0.1:1")),
        ("SEAWALL_URL", format!("postgres://admin:{SECRET}@127.0.0.1:1")),
    ] {
        let home = tempfile::tempdir().unwrap();

        let output = run(seawall().current_dir(home.path()).env(name, &value).arg("nodes")).unwrap();

        assert!(!output.status.success(), "{name}");
        assert_silent(&output_of(&output), SECRET, name);
    }
}
