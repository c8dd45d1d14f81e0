//! Start of the binary, and reasons why it fails: settings, ports, data directories, databases.

use std::{
    fs,
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt,
};

use rustix::process::Signal;

use super::{STOP_MAX, assert_refused, complaint, done, serve};
use crate::harness::process::{GatewayProcess, run, seawall};

#[test]
fn unknown_or_bad_setting_is_named_with_exit_2() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("seawall.toml");
    let config = file.to_str().unwrap();
    for (text, named) in [
        ("[limits]\nhead_byte_max = 1\n", ["limits.head_byte_max", "unknown"]),
        (
            "[limits]\nhead_bytes_max = 1\n",
            ["limits.head_bytes_max", "1024 to 65536"],
        ),
        ("[server]\nlisten = \"nowhere\"\n", ["server.listen", "line 2"]),
        ("[logging]\nlevel = \"a=b=c\"\n", ["logging.level", "expected one of"]),
        (
            "[identity]\nslot_header = \"Host\"\n",
            ["identity.slot_header", "meaning"],
        ),
        (
            "[admission]\nkeys_in_flight_max = 0\n",
            ["admission.keys_in_flight_max", "65536"],
        ),
    ] {
        fs::write(&file, text).unwrap();

        assert_refused(&serve(&["--config", config]), 2, &named);
    }
}

#[test]
fn wrong_flags_and_environment_are_named_with_exit_2() {
    assert_refused(&serve(&["--no-such-flag"]), 2, &["--no-such-flag"]);
    assert_refused(&serve(&["--max-memory", "lots"]), 2, &["--max-memory", "lots"]);
    assert_refused(
        &serve(&["--max-memory", "1000000"]),
        2,
        &["max_memory_bytes", "1000000", "67108864"],
    );
    assert_refused(&serve(&["--tls-cert", "cert.pem"]), 2, &["tls.key"]);
    assert_refused(
        &serve(&["--tls-cert", "cert.pem", "--tls-key", "key.pem"]),
        2,
        &["tls.certificate", "cert.pem"],
    );
    assert_refused(
        &serve(&["--database", "mysql://u:hidden@h/d"]),
        2,
        &["--database", "postgres://"],
    );
    assert!(!complaint(&serve(&["--database", "mysql://u:hidden@h/d"])).contains("hidden"));

    assert_refused(
        &serve(&["--database", "postgres://h:port/d"]),
        2,
        &["--database", "the port"],
    );

    let bad = run(seawall().arg("serve").env("SEAWALL_OPS_LISTEN", "nowhere")).unwrap();
    assert_refused(&bad, 2, &["--ops-listen", "nowhere"]);
}

#[test]
fn mistyped_parameter_of_the_database_url_stops_the_start_in_flag_and_file() {
    let url = "postgres://fleet@127.0.0.1:5/fleet?sslmod=hidden";
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("seawall.toml");
    fs::write(&file, format!("[database]\nurl = \"{url}\"\n")).unwrap();

    for arguments in [["--database", url], ["--config", file.to_str().unwrap()]] {
        let output = serve(&arguments);

        assert_refused(&output, 2, &["unknown parameter sslmod"]);
        assert!(!complaint(&output).contains("hidden"), "{}", complaint(&output));
    }
}

#[test]
fn other_mistakes_of_the_database_url_and_misspelt_variables_stop_the_start() {
    for (url, named) in [
        (
            "postgres://fleet@127.0.0.1:5/fleet?sslMode=hidden",
            "unknown parameter sslMode",
        ),
        (
            "postgres://fleet@127.0.0.1:5/fleet?sslrootcert=/hidden/ca.pem",
            "parameter sslrootcert",
        ),
        ("sqlite:a.db?mode=hidden", "parameter mode"),
        ("sqlite::memory:", "in memory"),
    ] {
        let output = serve(&["--database", url]);

        assert_refused(&output, 2, &[named]);
        assert!(!complaint(&output).contains("hidden"), "{}", complaint(&output));
    }
    let misspelt = run(seawall().arg("serve").env("SEAWALL_LISTNE", "127.0.0.1:0")).unwrap();
    assert_refused(&misspelt, 2, &["SEAWALL_LISTNE", "SEAWALL_LISTEN"]);
}

#[test]
fn no_part_of_a_password_that_is_not_encoded_is_shown_by_any_verb() {
    for mark in ["#", "?", "/"] {
        for head in ["Sup3r", "1234"] {
            let url = format!("postgres://fleet:{head}{mark}T41l@127.0.0.1:5/fleet");
            for verb in ["serve", "migrate", "doctor"] {
                let home = tempfile::tempdir().unwrap();
                let mut command = seawall();
                command
                    .current_dir(home.path())
                    .env("SEAWALL_URL", "http://127.0.0.1:9");

                let output = run(command.args([verb, "--database", &url])).unwrap();

                let shown = format!(
                    "{}{}",
                    String::from_utf8_lossy(&output.stdout),
                    String::from_utf8_lossy(&output.stderr)
                );
                assert!(!output.status.success(), "{verb}: {shown}");
                assert!(!shown.contains(head) && !shown.contains("T41l"), "{verb}: {shown}");
            }
        }
    }
}

#[test]
fn host_names_ports_alone_and_units_of_memory_are_taken() {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join("seawall.toml");
    fs::write(&config, "[server]\nlisten = \"localhost:0\"\n").unwrap();
    let config = config.to_str().unwrap();
    let start = |flags: &[&str]| run(seawall().current_dir(home.path()).arg("serve").args(flags)).unwrap();

    drop(GatewayProcess::start(&["--max-memory", "1G"]).unwrap());
    assert_refused(&start(&["--listen", ":x"]), 2, &["--listen", ":x", "HOST:PORT"]);
    assert_refused(&start(&["--listen", "no-such-host.invalid:0"]), 2, &["no address"]);
    assert_refused(&start(&["--max-memory", "1X"]), 2, &["--max-memory", "512M"]);
    assert_refused(
        &start(&["--config", config, "--ops-listen", ":0"]),
        2,
        &["ops.listen", "0.0.0.0:0", "--insecure-ops"],
    );
}

#[test]
fn variable_that_names_no_setting_is_warned_of() {
    let home = tempfile::tempdir().unwrap();
    let variables = [
        ("SEAWALL_HEARTBEAT", "secret-value"),
        ("SEAWALL_PORT_8080_TCP", "tcp://10.0.0.1"),
    ];
    let gateway = GatewayProcess::start_with(&home.path().join("data"), &variables).unwrap();

    let log = gateway.log().unwrap();
    assert!(
        log.contains("SEAWALL_HEARTBEAT") && !log.contains("SEAWALL_PORT"),
        "{log}"
    );
    assert!(!log.contains("secret-value"), "{log}");
}

#[test]
fn ops_address_outside_loopback_stops_the_start() {
    let mut command = seawall();
    let home = tempfile::tempdir().unwrap();
    command
        .current_dir(home.path())
        .args(["serve", "--ops-listen", "0.0.0.0:0"]);

    assert_refused(&run(&mut command).unwrap(), 2, &["ops.listen", "--insecure-ops"]);
}

#[test]
fn unreadable_configuration_is_named_with_exit_2() {
    assert_refused(
        &serve(&["--config", "/nonexistent/seawall.toml"]),
        2,
        &["/nonexistent/seawall.toml"],
    );
    assert_refused(&serve(&["--config", "/"]), 2, &["configuration file /"]);
}

#[test]
fn taken_port_is_exit_1() {
    let taken = TcpListener::bind(SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = taken.local_addr().unwrap().to_string();
    let home = tempfile::tempdir().unwrap();
    for flags in [
        ["--listen", &address, "--ops-listen", "127.0.0.1:0"],
        ["--ops-listen", &address, "--listen", "127.0.0.1:0"],
    ] {
        let mut command = seawall();
        command.current_dir(home.path()).arg("serve").args(flags);

        assert_refused(&run(&mut command).unwrap(), 1, &[&address, "in use"]);
        assert!(!home.path().join("seawall-data/addresses.json").exists());
    }
}

#[test]
fn unusable_data_directory_is_exit_1() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("file");
    fs::write(&file, "").unwrap();
    let inside = file.join("data");

    for path in [file.to_str().unwrap(), inside.to_str().unwrap(), "/proc/seawall-data"] {
        assert_refused(&serve(&["--data-dir", path]), 1, &["data directory", path]);
    }
}

#[test]
fn second_gateway_on_a_data_directory_is_exit_2() {
    let first = GatewayProcess::start(&[]).unwrap();

    let second = serve(&["--data-dir", first.data_dir().to_str().unwrap()]);

    assert_refused(&second, 2, &["another gateway", first.data_dir().to_str().unwrap()]);
}

#[test]
fn unusable_database_is_exit_1() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("not.db");
    fs::write(&file, "this is not a database, whatever its length".repeat(100)).unwrap();

    let refused = serve(&["--database", &format!("sqlite:{}", file.display())]);

    assert_refused(&refused, 1, &["not.db", "not an SQLite database"]);
}

#[test]
fn first_start_makes_files_that_only_the_owner_reads() {
    let gateway = GatewayProcess::start(&[]).unwrap();

    let token = fs::metadata(gateway.data_dir().join("admin.token")).unwrap();
    assert_eq!(token.permissions().mode() & 0o777, 0o600);
    assert_eq!(
        fs::metadata(gateway.data_dir()).unwrap().permissions().mode() & 0o777,
        0o700
    );
}

#[test]
fn data_directory_is_free_again_after_a_kill() {
    let home = tempfile::tempdir().unwrap();
    let data_dir = home.path().join("data");
    let mut first = GatewayProcess::start_on(&data_dir, &[]).unwrap();
    first.signal(Signal::KILL).unwrap();
    first.wait(STOP_MAX).unwrap();

    let second = GatewayProcess::start_on(&data_dir, &[]).unwrap();

    assert!(run(&mut second.operator(&["nodes"])).unwrap().status.success());
}

#[test]
fn migrate_makes_the_tables_without_a_gateway() {
    let home = tempfile::tempdir().unwrap();

    done(seawall().arg("migrate").current_dir(home.path()));

    assert!(home.path().join("seawall-data/seawall.db").is_file());
}

#[test]
fn database_password_in_an_argument_is_warned_of_and_in_the_environment_is_not() {
    const URL: &str = "postgres://fleet:hunter2@127.0.0.1:1/db";
    let warning = "database password in the list of processes";

    let shown = GatewayProcess::start(&["--database", URL]).unwrap();
    let log = shown.log().unwrap();
    assert!(log.contains(warning) && !log.contains("hunter2"), "{log}");

    let home = tempfile::tempdir().unwrap();
    let hidden = GatewayProcess::start_with(&home.path().join("data"), &[("SEAWALL_DATABASE", URL)]).unwrap();
    let log = hidden.log().unwrap();
    assert!(!log.contains(warning) && !log.contains("hunter2"), "{log}");
}
