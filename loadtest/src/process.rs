//! The programs a run is made of: started with their output in a log file, watched, and always ended.
//!
//! The one type to read is [`Process`]. [`freeze`] and [`Slowness`] disturb one from outside.

use std::{
    fs::{self, File},
    io::{self, Write as _},
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, ExitStatus, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use rustix::process::{Pid, Signal, kill_process};

use crate::guard;

/// How often a process is asked whether it has ended, or a file whether it is there.
const POLL_EVERY: Duration = Duration::from_millis(20);
/// Lines of a log that an error message shows.
const TAIL_LINES: usize = 12;
/// One period of slowness: short against every timeout, long against a time slice.
const SLOW_PERIOD: Duration = Duration::from_millis(40);

/// A running program. It is killed, with everything below it, when this value is dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    /// Where it takes orders.
    orders: Option<ChildStdin>,
    pid: Pid,
    log: PathBuf,
    ended: Option<ExitStatus>,
}

impl Process {
    /// Starts `command` in a process group of its own, without input, its output and errors at the end of `log`.
    ///
    /// # Errors
    /// The log can't be written, or the program can't be started.
    pub fn start(name: impl Into<String>, command: &mut Command, log: &Path) -> Result<Self> {
        Self::start_with(name, command, log, Stdio::null())
    }

    /// As [`start`](Self::start), and it takes orders, a line each, on its standard input.
    ///
    /// # Errors
    /// The log can't be written, or the program can't be started.
    pub fn start_steered(name: impl Into<String>, command: &mut Command, log: &Path) -> Result<Self> {
        Self::start_with(name, command, log, Stdio::piped())
    }

    fn start_with(name: impl Into<String>, command: &mut Command, log: &Path, input: Stdio) -> Result<Self> {
        let name = name.into();
        let out = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("opening {}", log.display()))?;
        let err = out.try_clone().context("duplicating the log's handle")?;
        let mut child = command
            .stdin(input)
            .stdout(out)
            .stderr(err)
            .process_group(0) // a Ctrl-C at the terminal is for us; we pass it on in order
            .spawn()
            .with_context(|| format!("starting {name} ({})", command.get_program().display()))?;
        let pid = Pid::from_child(&child);
        guard::add_process(pid);
        Ok(Self {
            name,
            orders: child.stdin.take(),
            child,
            pid,
            log: log.to_owned(),
            ended: None,
        })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub const fn pid(&self) -> Pid {
        self.pid
    }

    /// How it ended, if it has.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().ok().flatten();
            if self.ended.is_some() {
                guard::forget_process(self.pid);
            }
        }
        self.ended
    }

    /// # Errors
    /// It has ended; the message says how, and shows the end of its log.
    pub fn check(&mut self) -> Result<()> {
        match self.ended() {
            Some(status) => bail!("{} ended by itself ({}); {}", self.name, how(status), self.tail()),
            None => Ok(()),
        }
    }

    pub fn signal(&mut self, signal: Signal) {
        if self.ended().is_none() {
            // The process may have ended since.
            let _ = kill_process(self.pid, signal);
        }
    }

    /// Gives it an order: one line.
    ///
    /// # Errors
    /// It takes none, or has ended.
    pub fn order(&mut self, order: &str) -> Result<()> {
        let name = &self.name;
        let orders = self
            .orders
            .as_mut()
            .with_context(|| format!("{name} takes no orders"))?;
        writeln!(orders, "{order}").with_context(|| format!("ordering {name} to {order}"))
    }

    /// Asks it to end (`signal`), waits up to `grace`, then kills it. Returns how it ended.
    pub async fn stop(&mut self, signal: Signal, grace: Duration) -> ExitStatus {
        self.signal(signal);
        let deadline = Instant::now() + grace;
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            if Instant::now() >= deadline {
                return self.kill();
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
    }

    /// Waits until the process ends on its own.
    ///
    /// # Cancel safety
    /// Safe: the process continues and can be waited for again.
    pub async fn wait(&mut self) -> ExitStatus {
        loop {
            if let Some(status) = self.ended() {
                return status;
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
    }

    /// Kills it at once, with everything below it, even if they are stopped.
    pub fn kill(&mut self) -> ExitStatus {
        if let Some(status) = self.ended() {
            return status;
        }
        guard::end_tree(self.pid);
        let status = self
            .child
            .wait()
            .unwrap_or_else(|_| ExitStatus::from_raw(Signal::KILL.as_raw()));
        guard::forget_process(self.pid);
        self.ended = Some(status);
        status
    }

    /// The end of its log, for an error message.
    #[must_use]
    pub fn tail(&self) -> String {
        let text = fs::read(&self.log).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
        if lines.is_empty() {
            return "it wrote nothing".to_owned();
        }
        let last = lines.get(lines.len().saturating_sub(TAIL_LINES)..).unwrap_or_default();
        format!("its last words:\n  {}", last.join("\n  "))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Stops a process and all below it where they are: connections stay open, and nothing answers.
pub fn freeze(pid: Pid) {
    signal_all(pid, Signal::STOP);
}

/// Resumes them.
pub fn thaw(pid: Pid) {
    signal_all(pid, Signal::CONT);
}

/// Parents first: a process that is stopped starts no new one that would be missed.
fn signal_all(first: Pid, signal: Signal) {
    // The owner has not reaped it, so its number is still its own.
    let _ = kill_process(first, signal);
    for pid in guard::tree(first).into_iter().skip(1) {
        // Children come and go: this one may have gone.
        let _ = kill_process(pid, signal);
    }
}

/// A process, and all below it, run for a part of the time only, until this value is dropped.
#[derive(Debug)]
pub struct Slowness {
    ends: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Slowness {
    /// It runs for one part in `factor` of the time, in slices of 40 ms.
    #[must_use]
    pub fn begin(pid: Pid, factor: f64) -> Self {
        let ends = Arc::new(AtomicBool::new(false));
        let ended = Arc::clone(&ends);
        let running = SLOW_PERIOD.div_f64(factor.max(1.0));
        let thread = std::thread::spawn(move || {
            while !ended.load(Ordering::Relaxed) {
                freeze(pid);
                std::thread::sleep(SLOW_PERIOD.saturating_sub(running));
                thaw(pid);
                std::thread::sleep(running);
            }
        });
        Self {
            ends,
            thread: Some(thread),
        }
    }
}

impl Drop for Slowness {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It only sleeps and signals: it can't have failed, and it also resumes what it stopped.
            drop(thread.join());
        }
    }
}

/// Runs a short-lived program to its end and returns what it wrote to its output.
///
/// # Errors
/// It can't be started, does not end within `time_max`, or fails; the message has what it wrote.
pub async fn output(name: &str, command: Command, time_max: Duration) -> Result<String> {
    let mut command = tokio::process::Command::from(command);
    command.stdin(Stdio::null()).kill_on_drop(true);
    let output = tokio::time::timeout(time_max, command.output())
        .await
        .with_context(|| format!("{name} did not end within {time_max:?}"))?
        .with_context(|| format!("starting {name}"))?;
    if !output.status.success() {
        let words = [output.stdout, output.stderr].concat();
        bail!(
            "{name} failed ({}): {}",
            how(output.status),
            String::from_utf8_lossy(&words).trim()
        );
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Waits for `look` to find something, as long as `process` lives.
///
/// # Errors
/// The process ended, or `time_max` passed; both messages show the end of its log.
pub async fn await_from<T>(
    process: &mut Process,
    what: &str,
    time_max: Duration,
    mut look: impl FnMut() -> Option<T>,
) -> Result<T> {
    let deadline = Instant::now() + time_max;
    loop {
        if let Some(found) = look() {
            return Ok(found);
        }
        process.check()?;
        if Instant::now() >= deadline {
            bail!(
                "{} gave no {what} within {time_max:?}; {}",
                process.name(),
                process.tail()
            );
        }
        tokio::time::sleep(POLL_EVERY).await;
    }
}

/// Resident memory of a process, in bytes. None where it has gone.
#[must_use]
pub fn resident_bytes(pid: Pid) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{}/status", pid.as_raw_nonzero())).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kilobytes: u64 = line.split_ascii_whitespace().next()?.parse().ok()?;
    Some(kilobytes * 1024)
}

/// Open files and sockets of a process, and its threads. None where it has gone.
#[must_use]
pub fn handles_and_threads(pid: Pid) -> Option<(u64, u64)> {
    let count = |what: &str| {
        let entries = fs::read_dir(format!("/proc/{}/{what}", pid.as_raw_nonzero())).ok()?;
        u64::try_from(entries.count()).ok()
    };
    Some((count("fd")?, count("task")?))
}

/// A free TCP port of 127.0.0.1. Somebody else may take it before it is used: callers try again.
///
/// # Errors
/// No port can be had.
pub fn free_port() -> io::Result<u16> {
    Ok(std::net::TcpListener::bind(("127.0.0.1", 0))?.local_addr()?.port())
}

fn how(status: ExitStatus) -> String {
    match (status.code(), status.signal()) {
        (Some(code), _) => format!("exit {code}"),
        (None, Some(signal)) => format!("killed by signal {signal}"),
        (None, None) => "no status".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn stop_kills_what_ignores_the_request() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let mut process = Process::start(
            "stubborn",
            Command::new("sh").args(["-c", "trap '' TERM; echo ready; while :; do sleep 0.05; done"]),
            &log,
        )
        .unwrap();
        await_from(&mut process, "word", Duration::from_secs(5), || {
            fs::read_to_string(&log)
                .is_ok_and(|text| text.contains("ready"))
                .then_some(())
        })
        .await
        .unwrap();

        let status = process.stop(Signal::TERM, Duration::from_millis(100)).await;

        assert_eq!(status.signal(), Some(Signal::KILL.as_raw()));
    }

    #[tokio::test]
    async fn a_process_that_died_is_reported_with_its_last_words() {
        let folder = tempfile::tempdir().unwrap();
        let mut process = Process::start(
            "short-lived",
            Command::new("sh").args(["-c", "echo no such setting >&2; exit 2"]),
            &folder.path().join("log"),
        )
        .unwrap();

        let error = await_from(&mut process, "address", Duration::from_secs(5), || None::<()>)
            .await
            .unwrap_err();

        let text = error.to_string();
        assert!(text.contains("exit 2") && text.contains("no such setting"), "{text}");
    }

    #[tokio::test]
    async fn frozen_and_slow_processes_do_less_and_continue() {
        let folder = tempfile::tempdir().unwrap();
        let count = "i=0; while :; do i=$((i + 1)); echo $i; done";
        let process = Process::start(
            "counting",
            Command::new("sh").args(["-c", count]),
            &folder.path().join("log"),
        )
        .unwrap();
        let written = || fs::metadata(folder.path().join("log")).unwrap().len();
        // Bytes written in a while.
        let progress = async || {
            let before = written();
            tokio::time::sleep(Duration::from_millis(400)).await;
            written() - before
        };
        while written() == 0 {
            tokio::time::sleep(POLL_EVERY).await;
        }

        freeze(process.pid());
        tokio::time::sleep(POLL_EVERY).await;
        assert_eq!(progress().await, 0);
        thaw(process.pid());
        let full = progress().await;
        let slowness = Slowness::begin(process.pid(), 20.0);
        let slow = progress().await;
        drop(slowness);

        assert!(full > 0 && slow < full / 2, "{slow} of {full}");
        assert!(progress().await > 0);
    }

    #[tokio::test]
    async fn open_files_and_threads_are_counted() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let script = "exec 5</dev/null 6</dev/null 7</dev/null; echo ready; sleep 60";
        let mut process = Process::start("holder", Command::new("sh").args(["-c", script]), &log).unwrap();
        await_from(&mut process, "word", Duration::from_secs(5), || {
            fs::read_to_string(&log)
                .is_ok_and(|text| text.contains("ready"))
                .then_some(())
        })
        .await
        .unwrap();

        let (files, threads) = handles_and_threads(process.pid()).unwrap();

        assert!(files >= 6 && threads == 1, "{files} files, {threads} threads");
    }

    #[test]
    fn own_memory_is_read() {
        assert!(resident_bytes(rustix::process::getpid()).unwrap() > 100_000);
    }
}
