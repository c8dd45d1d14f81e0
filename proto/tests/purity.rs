//! The crate cannot use a clock, a random source, a file or a socket unnoticed: its lints reject that. Its own
//! dependencies exclude clocks and random sources.

#![expect(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "the test runs other programs, on a file of its own"
)]

use std::{
    fs::File,
    io::Write as _,
    path::Path,
    process::{Command, Output},
};

/// One use of each item of the standard library that `clippy.toml` bans.
const IMPURE: &str = "
pub fn banned() {
    let (instant, wall) = (std::time::Instant::now(), std::time::SystemTime::now());
    let _ = (instant.elapsed(), wall.elapsed());
    std::thread::sleep(std::time::Duration::ZERO);
    let _ = std::env::var(\"HOME\");
    let _ = (std::collections::HashMap::<u8, u8>::new(), std::collections::HashSet::<u8>::new());
    let _ = std::hash::RandomState::new();
    let _ = (std::fs::read(\"in\"), std::fs::read_to_string(\"in\"), std::fs::write(\"out\", \"\"));
    let _ = std::fs::File::open(\"in\");
    let _ = (std::net::TcpStream::connect(\"host:1\"), std::net::UdpSocket::bind(\"host:1\"));
    let _ = std::process::Command::new(\"program\");
}
";

#[test]
fn a_clock_a_random_source_an_unordered_map_a_file_or_a_socket_fails_the_lints() {
    // It is in the same directory as the cargo that runs this test.
    let clippy = Path::new(env!("CARGO")).with_file_name("clippy-driver");
    if !clippy.exists() {
        return skip_without_program(&format!("the lints of proto: {} is missing", clippy.display()));
    }
    let folder = tempfile::tempdir().unwrap();
    let source = folder.path().join("impure.rs");
    std::fs::write(&source, IMPURE).unwrap();

    let output = Command::new(&clippy)
        .args([
            "--crate-type=lib",
            "--emit=metadata",
            "--edition=2024",
            "-Dclippy::all",
            "--out-dir",
        ])
        .args([folder.path(), &source])
        .env("CLIPPY_CONF_DIR", env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();

    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{said}");
    for path in [
        "std::time::Instant::now",
        "std::time::Instant::elapsed",
        "std::time::SystemTime::now",
        "std::time::SystemTime::elapsed",
        "std::thread::sleep",
        "std::env::var",
        "std::collections::HashMap",
        "std::collections::HashSet",
        "std::hash::RandomState",
        "std::fs::read",
        "std::fs::read_to_string",
        "std::fs::write",
        "std::fs::File",
        "std::net::TcpStream",
        "std::net::UdpSocket",
        "std::process::Command",
    ] {
        assert!(said.contains(&format!("`{path}`")), "{path} is allowed: {said}");
    }
}

/// Reports that the test is skipped, because the machine lacks a program. `./test` installs every one, so there it is
/// an error.
#[track_caller]
fn skip_without_program(reason: &str) {
    let is_demanded = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(!is_demanded, "{reason}");
    eprintln!("SKIPPED: {reason}");
    if let Some(path) = std::env::var_os("TESTS_SKIPPED") {
        let file = File::options().append(true).create(true).open(path);
        let written = file.and_then(|mut file| writeln!(file, "{reason}"));
        written.expect("./test made the list of tests that are left out");
    }
}

#[test]
fn its_own_dependencies_hold_no_clock_and_no_random_source() {
    let Output { status, stdout, stderr } = Command::new(env!("CARGO"))
        .args([
            "tree",
            "--offline",
            "--locked",
            "-p",
            "seawall-proto",
            "-e",
            "normal",
            "--prefix",
            "none",
            "-f",
            "{p} {f}",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    let (tree, problem) = (String::from_utf8_lossy(&stdout), String::from_utf8_lossy(&stderr));
    assert!(status.success(), "{problem}");
    let features = |package: &str| {
        let line = tree.lines().find(|line| line.starts_with(package)).unwrap_or_default();
        line.split_whitespace().skip(2).collect::<Vec<_>>().join(" ")
    };

    assert_eq!(features("rand v"), "small_rng");
    assert_eq!(features("uuid v"), "serde,std");
}
