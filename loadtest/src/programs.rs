//! Where the programs are that we start, and building them first where cargo runs us.

use std::{
    env,
    path::{Path, PathBuf},
    process::Stdio,
};

use anyhow::{Context, Result, bail, ensure};
use tokio::process::Command;

/// Builds the programs that lie beside this one, where cargo started us; so that a load test never runs yesterday's gateway.
///
/// # Errors
/// The build failed; cargo has said why.
///
/// # Cancel safety
/// Dropped, it ends cargo.
pub async fn build(names: &[&str]) -> Result<()> {
    let Some(cargo) = env::var_os("CARGO") else {
        return Ok(());
    };
    let mut build = Command::new(cargo);
    build.args(["build", "--locked", "--quiet"]);
    let folder = folder()?;
    match folder.file_name().and_then(|name| name.to_str()) {
        Some("debug") | None => {}
        Some(profile) => {
            build.arg("--profile").arg(profile);
        }
    }
    for name in names {
        build.arg("--bin").arg(name);
    }
    if !is_on_path("make") {
        eprintln!(
            "no `make` here, which the gateway's allocator is built with (on Debian: apt-get install make): building with the system's allocator, \
             which takes more memory"
        );
        build.arg("--no-default-features");
    }
    if let Some(manifest) = env::var_os("CARGO_MANIFEST_DIR") {
        // From wherever we were started: `--bin` looks through the whole workspace, not only this package.
        let manifest = Path::new(&manifest);
        build.current_dir(manifest.parent().unwrap_or(manifest));
    }
    // What `cargo run` tells us about this package is no business of the others: build scripts that look at it would run again, and with them
    // most of the workspace would be compiled at every start.
    for (name, _) in env::vars_os() {
        if name.to_str().is_some_and(is_of_one_package) {
            build.env_remove(name);
        }
    }
    let status = build
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .status()
        .await
        .context("starting cargo")?;
    ensure!(status.success(), "cargo could not build {}", names.join(" and "));
    Ok(())
}

fn is_on_path(program: &str) -> bool {
    env::var_os("PATH").is_some_and(|path| env::split_paths(&path).any(|folder| folder.join(program).is_file()))
}

/// A variable that cargo sets for the one package that it runs.
fn is_of_one_package(name: &str) -> bool {
    [
        "CARGO_PKG_",
        "CARGO_MANIFEST_",
        "CARGO_BIN_",
        "CARGO_CRATE_",
        "CARGO_PRIMARY_",
    ]
    .iter()
    .any(|prefix| name.starts_with(prefix))
}

/// A program beside this one.
///
/// # Errors
/// It is not there.
pub fn find(name: &str) -> Result<PathBuf> {
    let path = folder()?.join(name);
    if !path.exists() {
        bail!(
            "no `{name}` beside this program ({}): build it with `cargo build --release --bin {name}`",
            path.display()
        );
    }
    Ok(path)
}

fn folder() -> Result<PathBuf> {
    let this = env::current_exe().context("looking for this program's own file")?;
    Ok(this.parent().map(Path::to_path_buf).unwrap_or_default())
}
