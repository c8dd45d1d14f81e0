//! A small process of our own that cleans up if we are killed.
//!
//! [`start`] runs this program again with one hidden argument, by which [`serve_if_asked`] knows its duty. That copy holds the reading
//! end of a pipe and notes the processes and folders it is told of; when the pipe closes, because we ended in whatever way, it
//! ends those processes with everything below them and removes those folders. An orderly end leaves it nothing to do.
//!
//! Where no guard was started (unit tests), registering is a no-op and the owners' `Drop` is all there is.

use std::{
    collections::{HashMap, HashSet},
    fs,
    io::{self, BufRead, Write},
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{ChildStdin, Command, Stdio},
    sync::{Mutex, OnceLock, PoisonError},
    thread,
    time::{Duration, Instant},
};

use rustix::process::{Pid, Signal, kill_process};

/// The hidden first argument.
const ARGUMENT: &str = "__guard";
/// How long ended processes may take to vanish before their folders are removed under them.
const VANISH_MAX: Duration = Duration::from_secs(2);

static PIPE: OnceLock<Mutex<ChildStdin>> = OnceLock::new();

/// Call first in `main`. In the guard's copy of the program this does the guard's work and ends the process; otherwise it does
/// nothing.
pub fn serve_if_asked() {
    if std::env::args_os().nth(1).is_some_and(|argument| argument == ARGUMENT) {
        watch(io::stdin().lock());
        std::process::exit(0);
    }
}

/// Starts the guard. Call it once, before there is anything to guard.
///
/// # Errors
/// It could not be started.
pub fn start() -> io::Result<()> {
    let mut child = Command::new(std::env::current_exe()?)
        .arg(ARGUMENT)
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0) // a Ctrl-C at the terminal must not reach it
        .spawn()?;
    let pipe = child.stdin.take().expect("stdin was asked for as a pipe above");
    drop(PIPE.set(Mutex::new(pipe)));
    Ok(())
}

/// Has the guard end `pid` and everything below it, should we be killed.
pub(crate) fn add_process(pid: Pid) {
    tell(&format!("+{}", pid.as_raw_nonzero()));
}

/// `pid` has ended: its number may come to belong to someone else.
pub(crate) fn forget_process(pid: Pid) {
    tell(&format!("-{}", pid.as_raw_nonzero()));
}

fn tell(line: &str) {
    if let Some(pipe) = PIPE.get() {
        let mut pipe = pipe.lock().unwrap_or_else(PoisonError::into_inner);
        // A guard that has died can't be told anything; the owners' `Drop` still cleans up.
        drop(writeln!(pipe, "{line}"));
    }
}

/// A temporary folder that is removed with its owner, and by the guard where the owner was killed.
#[derive(Debug)]
pub struct TempDir {
    inner: tempfile::TempDir,
}

impl TempDir {
    /// # Errors
    /// The system's folder for temporary files can't be written to.
    pub fn new(purpose: &str) -> io::Result<Self> {
        let inner = tempfile::Builder::new()
            .prefix(&format!("seawall-{purpose}-"))
            .tempdir()?;
        tell(&format!("d{}", inner.path().display()));
        Ok(Self { inner })
    }

    #[must_use]
    pub fn path(&self) -> &Path {
        self.inner.path()
    }
}

fn watch(lines: impl BufRead) {
    let mut pids = HashSet::new();
    let mut folders = Vec::new();
    for line in lines.lines().map_while(Result::ok) {
        let Some((kind, rest)) = line.split_at_checked(1) else {
            continue;
        };
        match kind {
            "+" => pids.extend(rest.parse().ok().and_then(Pid::from_raw)),
            "-" => {
                if let Some(pid) = rest.parse().ok().and_then(Pid::from_raw) {
                    pids.remove(&pid);
                }
            }
            "d" => folders.push(PathBuf::from(rest)),
            _ => {}
        }
    }
    let ended: Vec<Pid> = pids.into_iter().flat_map(end_tree).collect();
    let deadline = Instant::now() + VANISH_MAX;
    while Instant::now() < deadline && ended.iter().any(|pid| is_running(*pid)) {
        thread::sleep(Duration::from_millis(20));
    }
    for folder in folders {
        // Usually long gone: its owner removed it.
        drop(fs::remove_dir_all(folder));
    }
}

/// Kills `root` and everything below it, including stopped processes. Returns the signalled ones.
pub(crate) fn end_tree(root: Pid) -> Vec<Pid> {
    let tree = tree(root);
    for pid in &tree {
        // The process may have ended since.
        let _ = kill_process(*pid, Signal::KILL);
    }
    tree
}

/// Returns `root` and all its current descendants, parents first.
pub(crate) fn tree(root: Pid) -> Vec<Pid> {
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for pid in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = pid.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if let Some(parent) = parent_of(pid) {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = vec![root];
    let mut next = 0;
    while let Some(pid) = found.get(next) {
        next += 1;
        let below = children.remove(&pid.as_raw_nonzero().get()).unwrap_or_default();
        found.extend(below.into_iter().filter_map(Pid::from_raw));
    }
    found
}

/// A process that has ended and is not reaped yet does not run.
fn is_running(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, after_name)| !after_name.trim_start().starts_with('Z'))
}

/// The fourth field of `/proc/PID/stat`; the second is a name in brackets that may hold anything.
fn parent_of(pid: i32) -> Option<i32> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(')')?;
    after_name.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guard_ends_a_process_with_its_children_and_removes_the_folder() {
        let folder = tempfile::tempdir().unwrap().keep();
        let mut parent = Command::new("sh")
            .args(["-c", "sleep 60 & echo $!; wait"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        io::BufReader::new(parent.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let grandchild = Pid::from_raw(line.trim().parse().unwrap()).unwrap();

        watch(format!("+{}\nd{}\n+99999999999\n", parent.id(), folder.display()).as_bytes());

        assert!(!parent.wait().unwrap().success());
        assert!(!folder.exists());
        let deadline = Instant::now() + Duration::from_secs(5);
        while is_running(grandchild) {
            assert!(Instant::now() < deadline, "the child's child still runs");
            thread::sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn guard_leaves_processes_alone_that_ended_in_time() {
        let mut child = Command::new("sleep").arg("60").spawn().unwrap();

        watch(format!("+{0}\n-{0}\n", child.id()).as_bytes());

        assert!(child.try_wait().unwrap().is_none());
        child.kill().unwrap();
        child.wait().unwrap();
    }
}
