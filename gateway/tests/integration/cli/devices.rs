//! `seawall devices`: files of devices, and single ones.

use std::{fs, io::Write, net::TcpListener, os::unix::fs::PermissionsExt, process::Stdio};

use sqlx::{AssertSqlSafe, Connection as _, SqliteConnection};

use super::{assert_refused, done, json};
use crate::harness::process::{GatewayProcess, run, seawall};

#[test]
fn seed_import_and_list_fit_together() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("fleet.csv");
    let path = file.to_str().unwrap();
    let mut seed = gateway.operator(&[
        "devices",
        "seed",
        "--count",
        "300",
        "--out",
        path,
        "--model",
        "box",
        "--offline",
    ]);

    done(&mut seed);
    let again = run(&mut seed).unwrap();
    let imported = json(&run(&mut gateway.operator(&["devices", "import", path, "--json"])).unwrap());
    let skipped = json(&run(&mut gateway.operator(&["devices", "import", path, "--json"])).unwrap());
    let listed = json(&run(&mut gateway.operator(&["devices", "list", "--limit", "1000", "--json"])).unwrap());
    let page = json(&run(&mut gateway.operator(&["devices", "list", "--limit", "7", "--json"])).unwrap());

    assert_refused(&again, 1, &[path]);
    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(
        (imported["added"].as_u64(), skipped["skipped"].as_u64()),
        (Some(300), Some(300))
    );
    assert_eq!(listed["items"].as_array().unwrap().len(), 300);
    assert_eq!(listed["items"][0]["model"], "box");
    assert_eq!(
        (page["items"].as_array().unwrap().len(), page["next_cursor"].is_null()),
        (7, false)
    );
}

#[test]
fn seed_that_registers_nothing_fails_and_says_how_to_register_later() {
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("devices.csv");
    let file = path.to_str().unwrap();
    let seed = |url: &str| {
        let _ = fs::remove_file(&path);
        run(seawall()
            .args(["devices", "seed", "--count", "3", "--out", file, "--url", url])
            .env("SEAWALL_TOKEN", "x"))
        .unwrap()
    };

    let without_gateway = seed(&format!("http://{nobody}"));
    let gateway = GatewayProcess::start(&[]).unwrap();
    let without_token = seed(&format!("http://{}", gateway.addresses.ops));

    assert_refused(
        &without_gateway,
        1,
        &["cannot reach the gateway", "seawall devices import", file],
    );
    assert_refused(
        &without_token,
        1,
        &["does not accept this token", "seawall devices import", file],
    );
    assert_eq!(
        fs::read_to_string(&path).unwrap().lines().count(),
        4,
        "the file is there"
    );
}

#[test]
fn seed_into_an_empty_file_of_everybody_s_makes_it_the_owner_s() {
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("fleet.csv");
    fs::write(&file, "").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o666)).unwrap();

    done(
        seawall()
            .current_dir(home.path())
            .args(["devices", "seed", "--count", "1", "--offline", "--out"])
            .arg(&file),
    );

    assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o777, 0o600);
}

#[test]
fn device_with_a_name_is_added_shown_and_deleted_by_it() {
    let home = tempfile::tempdir().unwrap();
    let config = home.path().join("seawall.toml");
    fs::write(
        &config,
        "[identity]\nnamespace = \"6ba7b810-9dad-11d1-80b4-00c04fd430c8\"\n",
    )
    .unwrap();
    let gateway = GatewayProcess::start(&["--config", config.to_str().unwrap()]).unwrap();

    done(&mut gateway.operator(&["devices", "add", "CP/01 a"]));
    let shown = json(&run(&mut gateway.operator(&["devices", "show", "CP/01 a", "--json"])).unwrap());
    let listed = done(&mut gateway.operator(&["devices", "list"]));
    done(&mut gateway.operator(&["devices", "delete", "CP/01 a"]));

    assert_eq!(shown["external_id"], "CP/01 a");
    assert!(listed.contains("EXTERNAL ID") && listed.contains("CP/01 a"), "{listed}");
    let gone = run(&mut gateway.operator(&["devices", "show", "CP/01 a"])).unwrap();
    assert_refused(&gone, 1, &["404"]);
}

#[test]
fn seed_registers_where_a_gateway_answers() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let home = tempfile::tempdir().unwrap();
    let path = home.path().join("fleet.csv");

    done(&mut gateway.operator(&["devices", "seed", "--count", "5", "--out", path.to_str().unwrap()]));

    let listed = json(&run(&mut gateway.operator(&["devices", "list", "--json"])).unwrap());
    assert_eq!(listed["items"].as_array().unwrap().len(), 5);
}

#[test]
fn import_with_bad_lines_names_them_and_takes_nothing() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("fleet.csv");
    let good = "6f1f64a0-0000-4000-8000-000000000001,0123456789abcdef0123456789abcdef";
    fs::write(
        &file,
        format!("id,secret\n{good}\nnot-a-uuid,0123456789abcdef\n{good}\n"),
    )
    .unwrap();

    let output = run(&mut gateway.operator(&["devices", "import", file.to_str().unwrap()])).unwrap();

    let complaint = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{complaint}");
    assert!(complaint.contains("line 3"), "{complaint}");
    let listed = json(&run(&mut gateway.operator(&["devices", "list", "--json"])).unwrap());
    assert_eq!(listed["items"].as_array().unwrap().len(), 0);
    let missing = run(&mut gateway.operator(&["devices", "import", "/nonexistent.csv"])).unwrap();
    assert_refused(&missing, 1, &["/nonexistent.csv"]);
}

#[test]
fn refusal_of_a_long_import_is_seen() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("fleet.csv");
    fs::write(
        &file,
        format!("id,secret\n{}", format!("{}\n", "x".repeat(99)).repeat(300_000)),
    )
    .unwrap();
    let mut import = gateway.operator(&["devices", "import", file.to_str().unwrap()]);

    let without_leave = run(import.env("SEAWALL_TOKEN", "nobody")).unwrap();
    let all_bad = run(import.env_remove("SEAWALL_TOKEN")).unwrap();

    assert_refused(&without_leave, 1, &["does not accept this token"]);
    assert_eq!(all_bad.status.code(), Some(1));
    assert!(String::from_utf8(all_bad.stderr).unwrap().starts_with("line 2: "));
}

#[test]
fn device_is_added_changed_and_deleted() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let added = json(&run(&mut gateway.operator(&["devices", "add", "--tenant", "acme", "--json"])).unwrap());
    let id = added["id"].as_str().unwrap();

    let secret = done(&mut gateway.operator(&["devices", "rotate", id, "--overlap", "1h"]));
    done(&mut gateway.operator(&["devices", "disable", id]));
    let disabled = done(&mut gateway.operator(&["devices", "show", id]));
    done(&mut gateway.operator(&["devices", "enable", id]));
    let away = run(&mut gateway.operator(&["devices", "send", id, "{\"a\":1}"])).unwrap();
    let deleted = json(&run(&mut gateway.operator(&["devices", "delete", id, "--json"])).unwrap());
    let gone = run(&mut gateway.operator(&["devices", "show", id])).unwrap();

    assert!(secret.contains("secret") && !secret.contains(added["secret"].as_str().unwrap()));
    assert!(disabled.contains("disabled") && disabled.contains("acme"), "{disabled}");
    assert_refused(&away, 1, &["device_offline"]);
    assert_eq!(deleted, serde_json::json!({"deleted": id}));
    assert_refused(&gone, 1, &["404"]);
    let audit = done(&mut gateway.operator(&["audit"]));
    assert!(
        audit.contains(id) && !audit.contains(added["secret"].as_str().unwrap()),
        "{audit}"
    );
}

#[test]
fn several_devices_are_changed_by_one_command_and_from_standard_input() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let ids: Vec<String> = (0..3)
        .map(|_| {
            let added = json(&run(&mut gateway.operator(&["devices", "add", "--json"])).unwrap());
            added["id"].as_str().unwrap().to_owned()
        })
        .collect();
    let [a, b, c] = [&ids[0], &ids[1], &ids[2]].map(String::as_str);
    let missing = "6f1f64a0-0000-4000-8000-000000000001";
    let state = |id: &str| {
        let shown = json(&run(&mut gateway.operator(&["devices", "show", id, "--json"])).unwrap());
        shown["state"].as_str().unwrap().to_owned()
    };

    let disabled = run(&mut gateway.operator(&["devices", "disable", a, missing, b])).unwrap();
    let from_input = |arguments: &[&str]| {
        let mut child = gateway
            .operator(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let ids = format!("\u{feff}id\n{b}\n\n{c}\n");
        child.stdin.take().unwrap().write_all(ids.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    for verb in ["disable", "revoke", "delete"] {
        let unconfirmed = from_input(&["devices", verb, "-"]);
        assert_refused(&unconfirmed, 2, &["2 devices (0 devices are connected)", "--yes"]);
    }
    assert_eq!(state(c), "enabled");
    let mut many = vec!["devices", "disable"];
    many.extend([missing; 21]);
    let many = run(&mut gateway.operator(&many)).unwrap();
    assert_refused(&many, 2, &["Disable 21 devices", "--yes"]);
    let revoked = from_input(&["devices", "revoke", "-", "--yes"]);
    let enabled = run(&mut gateway.operator(&["devices", "enable", a, b, "--json"])).unwrap();

    // The others are changed even if one fails.
    assert_eq!(disabled.status.code(), Some(1));
    assert_eq!(
        String::from_utf8(disabled.stdout).unwrap(),
        format!("disabled {a}\ndisabled {b}\n")
    );
    assert!(String::from_utf8(disabled.stderr).unwrap().contains(missing));
    assert_eq!(
        String::from_utf8(revoked.stdout).unwrap(),
        format!("revoked {b}\nrevoked {c}\n")
    );
    // A revoked device stays revoked unless the option is given.
    assert_eq!(enabled.status.code(), Some(1));
    let report = json(&enabled);
    assert_eq!(
        (&report["items"][0]["id"], &report["failed"][0]["id"]),
        (&a.into(), &b.into())
    );
    assert_eq!(
        (state(a), state(b), state(c)),
        ("enabled".into(), "revoked".into(), "revoked".into())
    );
    assert_refused(
        &run(&mut gateway.operator(&["devices", "disable", b])).unwrap(),
        1,
        &["is revoked"],
    );
    done(&mut gateway.operator(&["devices", "enable", "--revoked", b]));
    assert_eq!(state(b), "enabled");
    // Standard input is not a terminal, so no confirmation is requested.
    done(&mut gateway.operator(&["devices", "delete", a, b]));
    assert_refused(
        &run(&mut gateway.operator(&["devices", "show", a])).unwrap(),
        1,
        &["404"],
    );
}

#[test]
fn device_is_updated_and_exported() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("devices.csv");
    let added = json(&run(&mut gateway.operator(&["devices", "add", "--model", "box", "--json"])).unwrap());
    let id = added["id"].as_str().unwrap();
    done(&mut gateway.operator(&["devices", "add", "--tenant", "other"]));

    done(&mut gateway.operator(&["devices", "update", id, "--tenant", "acme", "--model", ""]));
    done(&mut gateway.operator(&["devices", "export", "--tenant", "acme", "--out", file.to_str().unwrap()]));
    let all = done(&mut gateway.operator(&["devices", "export"]));

    let exported = fs::read_to_string(&file).unwrap();
    assert!(
        exported.starts_with("id,external_id,tenant,model,state,firmware,presence,since,"),
        "{exported}"
    );
    assert!(
        exported.contains(&format!("\n{id},,acme,,enabled,,unknown,,")),
        "{exported}"
    );
    assert_eq!((exported.lines().count(), all.lines().count()), (2, 3));
    assert!(!all.contains(added["secret"].as_str().unwrap()));
    let nothing = run(&mut gateway.operator(&["devices", "update", id])).unwrap();
    assert_refused(&nothing, 2, &["--tenant or --model"]);
}

#[test]
fn device_whose_row_can_not_be_read_is_named_and_all_others_are_exported() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let added: Vec<_> = (0..3)
        .map(|_| json(&run(&mut gateway.operator(&["devices", "add", "--json"])).unwrap()))
        .collect();
    let id = |number: usize| added[number]["id"].as_str().unwrap();
    let spoil = format!(
        "UPDATE devices SET updated_at = 'yesterday' WHERE id = unhex('{}')",
        id(1).replace('-', "")
    );
    let database = format!("sqlite:{}", gateway.data_dir().join("seawall.db").display());
    let spoiled = async {
        let mut hand = SqliteConnection::connect(&database).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(spoil)).execute(&mut hand).await.unwrap();
    };
    tokio::runtime::Runtime::new().unwrap().block_on(spoiled);
    let file = gateway.data_dir().join("devices.csv");

    let listed = run(&mut gateway.operator(&["devices", "list"])).unwrap();
    let in_json = json(&run(&mut gateway.operator(&["devices", "list", "--json"])).unwrap());
    let exported = run(&mut gateway.operator(&["devices", "export", "--out", file.to_str().unwrap()])).unwrap();

    assert!(listed.status.success());
    assert!(String::from_utf8_lossy(&listed.stderr).contains(id(1)), "{listed:?}");
    assert_eq!(in_json["unreadable"], serde_json::json!([id(1)]));
    assert_refused(&exported, 1, &[id(1)]);
    let exported = fs::read_to_string(file).unwrap();
    assert!(exported.contains(id(0)) && exported.contains(id(2)) && !exported.contains(id(1)));
}

#[test]
fn rotation_says_how_long_the_secrets_before_it_are_valid() {
    let gateway = GatewayProcess::start(&[]).unwrap();
    let added = json(&run(&mut gateway.operator(&["devices", "add", "--json"])).unwrap());
    let id = added["id"].as_str().unwrap();

    let first = done(&mut gateway.operator(&["devices", "rotate", id, "--overlap", "24h"]));
    let shown = done(&mut gateway.operator(&["devices", "show", id]));
    let second = done(&mut gateway.operator(&["devices", "rotate", id]));
    let after = json(&run(&mut gateway.operator(&["devices", "show", id, "--json"])).unwrap());

    let until = first.split("the old secret is valid until ").nth(1).unwrap().trim();
    assert!(shown.contains(until), "{shown}");
    assert!(second.contains("the old secret is not valid any more"), "{second}");
    assert!(
        second.contains(&format!("the secret before the old one was valid until {until}")),
        "{second}"
    );
    assert!(after["previous_secret_until"].is_null());
}
