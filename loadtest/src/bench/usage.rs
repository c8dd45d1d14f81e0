//! What a process uses: memory that is its own (Pss), and processor time.

use std::{collections::BTreeMap, ffi::OsString, fs, time::Duration};

use anyhow::{Context, Result};
use rustix::process::Pid;

/// User memory in bytes, pages that it shares with others in proportion. Kernel memory (the sockets themselves) is apart.
///
/// # Errors
/// The process is gone.
pub fn memory_bytes(pid: Pid) -> Result<u64> {
    let path = format!("/proc/{}/smaps_rollup", pid.as_raw_nonzero());
    let text = fs::read_to_string(&path).with_context(|| format!("reading {path}"))?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix("Pss:"))
        .context("no Pss in smaps_rollup")?;
    let kilobytes: u64 = line
        .split_ascii_whitespace()
        .next()
        .context("an empty Pss")?
        .parse()
        .context("reading Pss")?;
    Ok(kilobytes * 1024)
}

/// Processor time of a process by its threads, in nanoseconds: user and system.
pub struct ProcessorTime(BTreeMap<OsString, u64>);

impl ProcessorTime {
    /// # Errors
    /// The process is gone.
    pub fn of(pid: Pid) -> Result<Self> {
        let path = format!("/proc/{}/task", pid.as_raw_nonzero());
        let mut times = BTreeMap::new();
        for thread in fs::read_dir(&path).with_context(|| format!("reading {path}"))? {
            let thread = thread.with_context(|| format!("reading {path}"))?;
            // A thread that has ended since has no time to show.
            let Ok(text) = fs::read_to_string(thread.path().join("schedstat")) else {
                continue;
            };
            let nanos = text.split(' ').next().context("an empty schedstat")?.parse();
            times.insert(thread.file_name(), nanos.context("reading schedstat")?);
        }
        Ok(Self(times))
    }

    /// Usage since then. Threads that ended meanwhile are left out: the servers' workers don't.
    pub fn since(&self, before: &Self) -> Duration {
        let used =
            |(thread, nanos): (&OsString, &u64)| nanos.saturating_sub(before.0.get(thread).copied().unwrap_or(0));
        Duration::from_nanos(self.0.iter().map(used).sum())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[test]
    fn work_and_memory_of_this_process_show() {
        let this = rustix::process::getpid();
        let (before, memory) = (ProcessorTime::of(this).unwrap(), memory_bytes(this).unwrap());
        let used = || ProcessorTime::of(this).unwrap().since(&before);

        let held = vec![1_u8; 32 << 20];
        let until = Instant::now() + Duration::from_secs(10);
        // Kept as it was seen: other tests' threads, whose time counts, may end at any moment.
        let used = loop {
            let used = used();
            if used >= Duration::from_millis(30) || Instant::now() >= until {
                break used;
            }
        };

        assert!(used >= Duration::from_millis(30));
        assert!(memory_bytes(this).unwrap() >= memory + (30 << 20));
        drop(held);
    }
}
