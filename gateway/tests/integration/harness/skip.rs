//! Tests that this machine cannot run: they report it, and `./test` repeats it at its end.

use std::{fs::File, io::Write};

/// Reports that a test is skipped, because the machine lacks something that it needs.
pub fn skip(reason: &str) {
    eprintln!("SKIPPED: {reason}");
    if let Some(path) = std::env::var_os("TESTS_SKIPPED") {
        let mut file = File::options().append(true).create(true).open(path).unwrap();
        writeln!(file, "{reason}").unwrap();
    }
}

/// The same for a missing program. `./test` installs all programs, so there it is an error.
#[track_caller]
pub fn skip_without_program(reason: &str) {
    let is_demanded = std::env::var("CI").is_ok_and(|value| value == "true");
    assert!(!is_demanded, "{reason}");
    skip(reason);
}
