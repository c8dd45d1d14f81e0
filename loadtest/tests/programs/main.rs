//! The programs as they are: `loadtest` beside a real `seawall`.

#![expect(clippy::unwrap_used, reason = "a test that cannot continue has failed")]

mod agreement;
mod bench;
mod lent_database;
mod outcomes;
mod running_gateway;
mod scale;
mod schema;
mod target;

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    sync::Once,
};

const LOADTEST: &str = env!("CARGO_BIN_EXE_loadtest");

fn told(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// The gateway beside `loadtest`; built first where nothing has built it yet.
fn seawall() -> PathBuf {
    static BUILT: Once = Once::new();
    let program = Path::new(LOADTEST).with_file_name("seawall");
    BUILT.call_once(|| {
        if !program.exists() {
            let status = Command::new(env!("CARGO"))
                .args([
                    "build",
                    "--locked",
                    "--quiet",
                    "--package",
                    "seawall-gateway",
                    "--bin",
                    "seawall",
                ])
                .current_dir(env!("CARGO_MANIFEST_DIR"))
                .status()
                .unwrap();
            assert!(status.success(), "the gateway can't be built");
        }
    });
    program
}
