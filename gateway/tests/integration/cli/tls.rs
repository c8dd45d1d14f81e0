//! TLS as operators set it up: the API over https, certificate findings of the doctor, renewal by SIGHUP.

use std::fs;

use rustix::{
    fs::{CWD, FileType, Mode, OFlags, mknodat},
    process::Signal,
};

use super::{STOP_MAX, assert_refused, done};
use crate::harness::{
    authority::Authority,
    process::{GatewayProcess, run, seawall},
    wait::eventually_blocking,
};

/// `[ops]` with a certificate of this CA.
fn ops_settings(authority: &mut Authority) -> String {
    authority
        .settings()
        .replace("[tls]\ncertificate", "[ops]\ntls_certificate")
        .replace("\nkey", "\ntls_key")
}

#[test]
fn operators_talk_to_the_api_over_https_with_an_authority_they_name() {
    let mut authority = Authority::new();
    let settings = ops_settings(&mut authority);
    let config = authority.write("seawall.toml", &settings);
    let gateway = GatewayProcess::start(&["--config", config.to_str().unwrap()]).unwrap();
    let https = |args: &[&str]| {
        let mut command = gateway.operator(args);
        command.env("SEAWALL_URL", format!("https://{}", gateway.addresses.ops));
        command
    };
    let ca = authority.path("ca.pem");

    let nodes = done(https(&["nodes", "--json"]).arg("--ca").arg(&ca));

    assert!(nodes.contains("\"sessions\""), "{nodes}");
    assert_refused(&run(&mut https(&["nodes"])).unwrap(), 1, &["cannot reach the gateway"]);
    assert_refused(
        &run(https(&["nodes"]).env("SEAWALL_CA", "/nowhere")).unwrap(),
        2,
        &["--ca", "/nowhere"],
    );
    // A client that uses plain HTTP learns that the port uses TLS.
    assert_refused(&run(&mut gateway.operator(&["nodes"])).unwrap(), 1, &["https://"]);
}

#[test]
fn certificate_is_taken_anew_at_sighup() {
    let mut authority = Authority::new();
    let settings = authority.settings();
    let config = authority.write("seawall.toml", &settings);
    let gateway = GatewayProcess::start(&["--config", config.to_str().unwrap()]).unwrap();
    let renewed = authority.server();
    authority.write_server(&renewed);

    gateway.signal(Signal::HUP).unwrap();

    let taken = "seawall_tls_reloads_total{outcome=\"taken\"}";
    eventually_blocking(|| gateway.metric(taken).unwrap() > 0);
}

#[test]
fn read_of_a_certificate_that_hangs_does_not_hold_up_sigterm() {
    let mut authority = Authority::new();
    let settings = authority.settings();
    let config = authority.write("seawall.toml", &settings);
    let mut gateway = GatewayProcess::start(&["--config", config.to_str().unwrap()]).unwrap();
    let (pipe, certificate) = (authority.path("pipe"), authority.path("gateway.pem"));
    mknodat(CWD, &pipe, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    fs::rename(&pipe, &certificate).unwrap();

    gateway.signal(Signal::HUP).unwrap();
    // Opening the pipe fails until the gateway reads it. After that the gateway waits for bytes that never come.
    let mut writer = None;
    eventually_blocking(|| {
        let flags = OFlags::WRONLY | OFlags::NONBLOCK;
        writer = rustix::fs::open(&certificate, flags, Mode::empty()).ok();
        writer.is_some()
    });
    gateway.signal(Signal::TERM).unwrap();

    let status = gateway.wait(STOP_MAX).unwrap();
    assert_eq!(status.code(), Some(0), "{}", gateway.log().unwrap());
    drop(writer);
}

#[test]
fn doctor_looks_at_certificates() {
    let mut authority = Authority::new();
    let settings = authority.settings();
    let config = authority.write("seawall.toml", &settings);
    let home = tempfile::tempdir().unwrap();
    let doctor = || {
        let mut command = seawall();
        command
            .current_dir(home.path())
            .args(["doctor", "--url", "http://127.0.0.1:1", "--config"])
            .arg(&config);
        let output = run(&mut command).unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(doctor().contains("is its key"));

    let (server, other) = (authority.server(), authority.server());
    authority.write("gateway.key", &other.key);
    assert!(doctor().contains("is not the key of"));

    authority.write_server(&server);
    let backwards = format!("{}{}", server.certificate, other.certificate);
    authority.write("gateway.pem", &backwards);
    assert!(doctor().contains("is not issued by certificate 2"));

    let with_root = format!("{}{}", server.certificate, authority.pem());
    authority.write("gateway.pem", &with_root);
    assert!(!doctor().contains("is not issued"));

    let ended = authority.ended_server();
    authority.write_server(&ended);
    assert!(doctor().contains("expired on"));
}

#[test]
fn doctor_says_what_revocation_lists_cover() {
    let mut authority = Authority::new();
    let settings = authority.settings_with_clients();
    let list = authority.path("revoked.pem");
    let config = authority.write("seawall.toml", &format!("{settings}client_crl = {list:?}\n"));
    let home = tempfile::tempdir().unwrap();
    let doctor = || {
        let mut command = seawall();
        command
            .current_dir(home.path())
            .args(["doctor", "--url", "http://127.0.0.1:1", "--config"])
            .arg(&config);
        let output = run(&mut command).unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let (factory, number) = authority.below("factory");

    authority.write("revoked.pem", &authority.revocations(&[&number]));
    let covered = doctor();
    assert!(covered.contains("the list of CN=test authority revokes 1"), "{covered}");
    assert!(!covered.contains("has no list of"), "{covered}");

    authority.write("revoked.pem", &factory.revocations_until(&[], 2026));
    let uncovered = doctor();
    assert!(uncovered.contains("has no list of CN=test authority"), "{uncovered}");
    assert!(
        uncovered.contains("the list of CN=factory should have been replaced by"),
        "{uncovered}"
    );
}
