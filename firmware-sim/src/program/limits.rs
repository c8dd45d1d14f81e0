//! How many devices this process can hold.

use anyhow::{Error, ensure};
use firmware_sim::{files, fleet::DEVICES_PER_PROCESS_MAX, mix::Mix, profile::Profile};

/// Files that the program needs beside its sockets: runtime, standard streams, libraries.
const FILES_OF_OUR_OWN: u64 = 128;

/// Raises the limit of open files as far as it goes, and says how many devices then fit.
pub fn devices_per_process(profiles: &Mix) -> Result<usize, Error> {
    let files = files::raise_limit();
    ensure!(
        files > FILES_OF_OUR_OWN,
        "only {files} files may be open: raise `ulimit -n`"
    );
    let sockets = usize::try_from(files - FILES_OF_OUR_OWN).unwrap_or(usize::MAX);
    let has_twins = profiles.names().any(|name| name == Profile::DuplicateId.to_string());
    let sockets_per_device = if has_twins { 2 } else { 1 };
    Ok((sockets.min(DEVICES_PER_PROCESS_MAX) / sockets_per_device).max(1))
}
