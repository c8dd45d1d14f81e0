//! A memory cgroup for a test, if this machine allows it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU32, Ordering},
    thread,
    time::{Duration, Instant},
};

/// Where cgroups are mounted: version 1, then version 2.
const ROOTS: [(&str, &str, &str); 2] = [
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.oom_control"),
    ("/sys/fs/cgroup", "memory.max", "memory.events"),
];
/// Maximum time for the kernel to remove the last process.
const PATIENCE: Duration = Duration::from_secs(10);

/// Removed when dropped. Its processes must have ended.
pub struct MemoryGroup {
    pub folder: PathBuf,
    events: &'static str,
}

impl MemoryGroup {
    /// `None` if this machine does not allow it.
    pub fn of(bytes: u64) -> Option<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("seawall-test-{}-{number}", std::process::id());
        ROOTS.iter().find_map(|(root, limit, events)| {
            let group = Self {
                folder: Path::new(root).join(&name),
                events,
            };
            fs::create_dir(&group.folder).ok()?;
            fs::write(group.folder.join(limit), bytes.to_string()).ok()?;
            Some(group)
        })
    }

    /// Number of processes that the kernel has killed in it.
    pub fn kills(&self) -> u64 {
        let events = fs::read_to_string(self.folder.join(self.events)).unwrap();
        let line = events.lines().find_map(|line| line.strip_prefix("oom_kill "));
        line.map_or(0, |figure| figure.trim().parse().unwrap())
    }
}

impl Drop for MemoryGroup {
    fn drop(&mut self) {
        let deadline = Instant::now() + PATIENCE;
        while fs::remove_dir(&self.folder).is_err() && self.folder.exists() && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(20));
        }
    }
}
