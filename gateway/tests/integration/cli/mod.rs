//! The binary as operators and service managers use it: exit status, one clear line, tables, signals.

use std::{
    process::{Command, Output},
    time::Duration,
};

use serde_json::Value;

use crate::harness::process::{run, seawall};

mod allocator;
mod configuration;
mod devices;
mod leave;
mod log;
mod secrets;
mod start;
mod status;
mod tls;
mod verbs;

/// Maximum time of a drain of a gateway without sessions.
const STOP_MAX: Duration = Duration::from_secs(10);

fn serve(args: &[&str]) -> Output {
    let home = tempfile::tempdir().unwrap();
    let mut command = seawall();
    command
        .current_dir(home.path())
        .args(["serve", "--listen", "127.0.0.1:0", "--ops-listen", "127.0.0.1:0"])
        .args(args);
    run(&mut command).unwrap()
}

/// Asserts the exit status, and that standard error is one line that contains all of `named`.
#[track_caller]
pub fn assert_refused(output: &Output, status: i32, named: &[&str]) {
    let complaint = complaint(output);
    assert_eq!(output.status.code(), Some(status), "{complaint}");
    for part in named {
        assert!(complaint.contains(part), "{part:?} is not in {complaint:?}");
    }
}

/// The line with the reason: the only line that is not JSON, or the last line of a gateway that logs JSON.
#[track_caller]
fn complaint(output: &Output) -> String {
    let text = String::from_utf8(output.stderr.clone()).unwrap();
    let lines: Vec<&str> = text.lines().filter(|line| !line.starts_with('{')).collect();
    if let (true, Some(last)) = (lines.is_empty(), text.lines().last()) {
        let line: Value = serde_json::from_str(last).unwrap();
        assert_eq!(
            (&line["level"], &line["message"]),
            (&"ERROR".into(), &"gateway failed".into()),
            "{text}"
        );
        return line["error"].as_str().unwrap().to_owned();
    }
    assert_eq!(lines.len(), 1, "{text}");
    lines[0].to_owned()
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[track_caller]
fn done(command: &mut Command) -> String {
    let output = run(command).unwrap();
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}
