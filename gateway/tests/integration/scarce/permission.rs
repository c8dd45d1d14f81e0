//! Files that the gateway's user may not use. Root may use all files, so there the gateway runs as nobody.

use std::{
    fs,
    os::unix::{
        fs::{PermissionsExt, chown},
        process::CommandExt,
    },
    path::{Path, PathBuf},
    process::Command,
};

use rustix::process::geteuid;

use super::super::{
    cli::assert_refused,
    harness::process::{run, seawall},
};

/// A user without permissions on every Linux.
const NOBODY: u32 = 65_534;

#[test]
fn data_directory_without_write_permission_is_exit_1() {
    let place = Place::new();
    let data = place.path("data");
    fs::create_dir(&data).unwrap();
    fs::set_permissions(&data, fs::Permissions::from_mode(0o555)).unwrap();

    let output = run(place
        .seawall()
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--ops-listen",
            "127.0.0.1:0",
            "--data-dir",
        ])
        .arg(&data))
    .unwrap();

    assert_refused(&output, 1, &["data directory", data.to_str().unwrap(), "ermission"]);
    assert_eq!(fs::read_dir(&data).unwrap().count(), 0, "nothing was left there");
}

#[test]
fn place_for_a_data_directory_without_write_permission_is_exit_1() {
    let place = Place::new();
    let parent = place.path("parent");
    fs::create_dir(&parent).unwrap();
    fs::set_permissions(&parent, fs::Permissions::from_mode(0o555)).unwrap();
    let data = parent.join("data");

    let output = run(place
        .seawall()
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--ops-listen",
            "127.0.0.1:0",
            "--data-dir",
        ])
        .arg(&data))
    .unwrap();

    assert_refused(&output, 1, &["data directory", data.to_str().unwrap()]);
}

#[test]
fn database_file_that_may_not_be_read_is_exit_1() {
    let place = Place::new();
    let file = place.path("seawall.db");
    fs::write(&file, "").unwrap();
    fs::set_permissions(&file, fs::Permissions::from_mode(0o000)).unwrap();
    let data = place.path("data");
    fs::create_dir(&data).unwrap();
    if geteuid().is_root() {
        chown(&data, Some(NOBODY), Some(NOBODY)).unwrap();
    }

    let output = run(place
        .seawall()
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--ops-listen",
            "127.0.0.1:0",
            "--data-dir",
        ])
        .arg(&data)
        .args(["--database", &format!("sqlite:{}", file.display())]))
    .unwrap();

    assert_refused(&output, 1, &[file.to_str().unwrap(), "read and write"]);
}

/// A directory that every user may read, with a copy of the binary that every user may run.
struct Place {
    home: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let home = tempfile::tempdir().unwrap();
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755)).unwrap();
        Self { home }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    /// The binary, run by a user other than root.
    fn seawall(&self) -> Command {
        let mut command = seawall();
        if geteuid().is_root() {
            // Other users may not even read the directory where it was built.
            let copy = self.path("seawall");
            fs::copy(Path::new(command.get_program()), &copy).unwrap();
            let mut as_nobody = Command::new(copy);
            as_nobody.env_clear().uid(NOBODY).gid(NOBODY);
            command = as_nobody;
        }
        command.current_dir(self.home.path());
        command
    }
}
