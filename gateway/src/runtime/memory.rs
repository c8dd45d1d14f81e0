//! Memory usage and limits of the process, and whether a further device fits. Start with [`Memory`].
//!
//! The figures are those by which the kernel kills: the usage of a cgroup with a limit, by all of its processes,
//! without the page cache, which the kernel can reclaim. For the configured maximum it is the cgroup's counter if this
//! process is alone in one, because that includes sockets. Otherwise it is the process's resident memory, plus an
//! estimate for sockets in the kernel. If no cgroup has a limit, the machine's usage is checked as well.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

use seawall_proto::memory::{Guard, Usage};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Maximum number of measurements in a row in which a limit may be unreadable, at least 6 s. Then it is dropped: its
/// cgroup is gone, or its files were never readable.
const UNREADABLE_MAX: u32 = 60;
/// Kernel memory for the socket of a device, in bytes. Measured with 15,000 of them; cgroups count it on their own.
const SOCKET_BYTES: u64 = 5 * 1024;
/// Maximum number of devices that wait for a lookup although no further device fits, because they would replace a
/// session of theirs here. Their ids are not verified yet. Their memory fits into what a full node keeps free.
const REPLACING_MAX: usize = 128;

/// This node's memory. By default nothing is measured, and every device fits.
#[derive(Debug)]
pub struct Memory {
    sources: Sources,
    guard: Mutex<Guard>,
    /// Number of consecutive measurements in which something was unreadable.
    unreadable: AtomicU32,
    replacing: Arc<Semaphore>,
}

impl Default for Memory {
    fn default() -> Self {
        Self::new(Sources::default())
    }
}

/// Sources of the figures.
#[derive(Debug, Default)]
pub struct Sources {
    /// This process's cgroup and its ancestors, without those that cannot have a limit.
    groups: Vec<Group>,
    /// The cgroup in which this process was alone at the start. Processes that join it later are included, so that the
    /// figures do not jump.
    alone: Option<Group>,
    /// Configured maximum of this process, in bytes; `None`: as much as there is.
    own_max: Option<u64>,
    /// Memory of the machine, in bytes. A higher limit has no effect.
    machine: u64,
    /// File with the machine's memory (proc(5)).
    meminfo: PathBuf,
}

/// A memory cgroup, of version 2 or 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    folder: PathBuf,
    version: Version,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Version {
    One,
    Two,
}

impl Memory {
    #[must_use]
    pub fn new(sources: Sources) -> Self {
        Self {
            sources,
            guard: Mutex::default(),
            unreadable: AtomicU32::new(0),
            replacing: Arc::new(Semaphore::new(REPLACING_MAX)),
        }
    }

    /// Measures. Returns the usage closest to its limit, if there is a limit. Blocks while it reads a few small files.
    pub fn measure(&self, sessions: usize) -> Option<Usage> {
        let mut usages = self.sources.measure(sessions);
        if self.gave_up_on(&usages) {
            usages.retain(Option::is_some);
        }
        self.guard().handle_measured(&usages);
        usages
            .into_iter()
            .flatten()
            .max_by(|one, other| one.fullness().total_cmp(&other.fullness()))
    }

    /// Whether something was unreadable for too long to rely on its last usage.
    fn gave_up_on(&self, usages: &[Option<Usage>]) -> bool {
        if usages.iter().all(Option::is_some) {
            self.unreadable.store(0, Ordering::Relaxed);
            return false;
        }
        let failures = self.unreadable.load(Ordering::Relaxed).saturating_add(1);
        self.unreadable.store(failures, Ordering::Relaxed);
        if failures == UNREADABLE_MAX {
            tracing::warn!(
                "memory limit dropped: its files cannot be read. They are those of the cgroup in /proc/self/cgroup, or /proc/meminfo"
            );
        }
        failures >= UNREADABLE_MAX
    }

    /// Whether a further device fits.
    #[must_use]
    pub fn has_room(&self) -> bool {
        self.guard().has_room()
    }

    /// Number of further devices that fit.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.guard().room()
    }

    /// Acquires room for a device. `None` if it does not fit.
    #[must_use]
    pub fn take(self: &Arc<Self>) -> Option<Room> {
        self.guard().try_acquire().then(|| Room(Hold::Taken(Arc::clone(self))))
    }

    /// Acquires room for a device that would replace its own session, although no further device fits. `None` if too
    /// many do.
    #[must_use]
    pub fn take_to_replace(&self) -> Option<Room> {
        let permit = Arc::clone(&self.replacing).try_acquire_owned();
        permit.ok().map(|permit| Room(Hold::Replacing(permit)))
    }

    /// See [`Guard::is_crowded`].
    #[must_use]
    pub fn is_crowded(&self) -> bool {
        self.guard().is_crowded()
    }

    /// Whether memory is short: new devices are refused.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.guard().is_full()
    }

    fn guard(&self) -> MutexGuard<'_, Guard> {
        self.guard.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Room for one device. It is released when dropped, unless it was committed.
#[derive(Debug)]
pub struct Room(Hold);

#[derive(Debug)]
enum Hold {
    Taken(Arc<Memory>),
    #[expect(dead_code, reason = "a permit is held, and released when it is dropped")]
    Replacing(OwnedSemaphorePermit),
    Committed,
}

impl Room {
    /// The device became a session. The next measurement includes its memory.
    pub fn commit(mut self) {
        if let Hold::Taken(memory) = std::mem::replace(&mut self.0, Hold::Committed) {
            memory.guard().commit();
        }
    }
}

impl Drop for Room {
    fn drop(&mut self) {
        if let Hold::Taken(memory) = &self.0 {
            memory.guard().release();
        }
    }
}

impl Sources {
    /// The sources of this process. `own_max` is the configured maximum; 0: that of its cgroups, or of the machine.
    #[must_use]
    pub fn of_process(own_max: u64) -> Self {
        let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        Self::of(
            Group::around(&groups, Path::new("/sys/fs/cgroup")),
            own_max,
            machine_bytes(),
        )
    }

    /// The sources of these cgroups, on a machine with `machine` bytes.
    #[must_use]
    pub fn of(mut groups: Vec<Group>, own_max: u64, machine: u64) -> Self {
        // A cgroup without memory counters (its controller is off) has no figures.
        let alone = groups
            .first()
            .filter(|group| group.is_ours_alone() && group.used().is_some())
            .cloned();
        groups.retain(|group| group.limit_now(machine).is_some());
        Self {
            groups,
            alone,
            own_max: (own_max > 0).then_some(own_max),
            machine,
            meminfo: PathBuf::from("/proc/meminfo"),
        }
    }

    /// The usage of each limit; `None` if it cannot be read this time.
    fn measure(&self, sessions: usize) -> Vec<Option<Usage>> {
        let groups = self
            .groups
            .iter()
            .filter_map(|group| match group.limit_now(self.machine) {
                Some(None) => None,
                Some(Some(limit)) => Some(group.used().map(|used| Usage { used, limit })),
                None => Some(None),
            });
        let mut usages: Vec<Option<Usage>> = groups.collect();
        if usages.is_empty() {
            let meminfo = fs::read_to_string(&self.meminfo);
            usages.push(meminfo.ok().and_then(|text| of_machine(&text)));
        }
        usages.extend(self.own_max.map(|limit| {
            let used = match &self.alone {
                Some(group) => group.used()?,
                None => resident()?.saturating_add(SOCKET_BYTES.saturating_mul(sessions as u64)),
            };
            Some(Usage { used, limit })
        }));
        usages
    }
}

impl Group {
    /// The cgroups of a process by its `/proc/PID/cgroup`, each before its parent. `root` is where they are mounted.
    #[must_use]
    pub fn around(groups: &str, root: &Path) -> Vec<Self> {
        let mut found = Vec::new();
        for line in groups.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(group)) = (parts.next(), parts.next()) else {
                continue;
            };
            let (root, version) = match controllers {
                "" => (root.to_owned(), Version::Two),
                "memory" => (root.join("memory"), Version::One),
                _ => continue,
            };
            let group = Path::new(group.trim_start_matches('/'));
            found.extend(group.ancestors().map(|group| Self {
                folder: root.join(group),
                version,
            }));
        }
        found
    }

    /// Its limit, in bytes; `None` if that is not below the machine's memory.
    #[must_use]
    pub fn limit(&self, machine: u64) -> Option<u64> {
        self.limit_now(machine).flatten()
    }

    /// The same; `None` if it cannot be read.
    fn limit_now(&self, machine: u64) -> Option<Option<u64>> {
        let (file, throttled_from) = match self.version {
            Version::One => ("memory.limit_in_bytes", None),
            // `max` means no limit. Above `memory.high` allocations are slowed down, to a standstill.
            Version::Two => ("memory.max", self.figure("memory.high")),
        };
        let text = fs::read_to_string(self.folder.join(file)).ok()?;
        let limits = [text.trim().parse().ok(), throttled_from];
        Some(
            limits
                .into_iter()
                .flatten()
                .filter(|limit| (1..machine).contains(limit))
                .min(),
        )
    }

    /// Its memory that cannot be reclaimed: without the page cache, and without the slabs of files.
    fn used(&self) -> Option<u64> {
        let (file, cache): (_, &[&str]) = match self.version {
            Version::One => ("memory.usage_in_bytes", &["total_inactive_file ", "total_active_file "]),
            Version::Two => (
                "memory.current",
                &["inactive_file ", "active_file ", "slab_reclaimable "],
            ),
        };
        let stat = fs::read_to_string(self.folder.join("memory.stat")).ok()?;
        let cached = stat.lines().filter_map(|line| {
            let figure = cache.iter().find_map(|name| line.strip_prefix(name))?;
            figure.trim().parse::<u64>().ok()
        });
        let cached = cached.fold(0, u64::saturating_add);
        Some(self.figure(file)?.saturating_sub(cached))
    }

    /// Whether it has no other processes.
    fn is_ours_alone(&self) -> bool {
        let processes = fs::read_to_string(self.folder.join("cgroup.procs")).unwrap_or_default();
        processes.trim() == std::process::id().to_string()
    }

    fn figure(&self, file: &str) -> Option<u64> {
        fs::read_to_string(self.folder.join(file)).ok()?.trim().parse().ok()
    }
}

/// Usage of a machine with this content of `/proc/meminfo`: the memory that is not available without swapping.
fn of_machine(meminfo: &str) -> Option<Usage> {
    let figure = |name: &str| {
        let line = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
        kib.checked_mul(1024)
    };
    let limit = figure("MemTotal:").filter(|limit| *limit > 0)?;
    let used = limit.saturating_sub(figure("MemAvailable:")?);
    Some(Usage { used, limit })
}

/// Memory of the machine, in bytes.
#[must_use]
pub fn machine_bytes() -> u64 {
    let machine = rustix::system::sysinfo();
    machine.totalram.saturating_mul(u64::from(machine.mem_unit))
}

/// Resident memory of this process, in bytes.
fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;
    const MACHINE: u64 = 8 << 30;

    fn write(folder: &Path, files: &[(&str, &str)]) {
        fs::create_dir_all(folder).unwrap();
        for (name, content) in files {
            fs::write(folder.join(name), content).unwrap();
        }
    }

    fn used_and_limit(sources: &Sources) -> Vec<(u64, u64)> {
        let usages = sources.measure(0);
        usages
            .iter()
            .flatten()
            .map(|usage| (usage.used / MIB, usage.limit / MIB))
            .collect()
    }

    #[test]
    fn groups_of_both_versions_count_without_their_page_cache() {
        let root = tempfile::tempdir().unwrap();
        write(
            &root.path().join("a/b"),
            &[
                ("memory.max", "134217728\n"),
                ("memory.current", "104857600\n"),
                (
                    "memory.stat",
                    "anon 1\ninactive_file 5242880\nactive_file 20971520\nslab_reclaimable 5242880\nsock 5\n",
                ),
            ],
        );
        write(
            &root.path().join("a"),
            &[("memory.max", "max\n"), ("memory.current", "1\n")],
        );
        write(
            &root.path().join("memory/c"),
            &[
                ("memory.limit_in_bytes", "268435456\n"),
                ("memory.usage_in_bytes", "209715200\n"),
                (
                    "memory.stat",
                    "inactive_file 7\ntotal_inactive_file 52428800\ntotal_active_file 0\n",
                ),
            ],
        );
        write(
            &root.path().join("memory"),
            &[("memory.limit_in_bytes", "9223372036854771712\n")],
        );

        let groups = Group::around("0::/a/b\n3:cpu:/x\n2:memory:/c\n", root.path());
        let sources = Sources::of(groups, 0, MACHINE);

        assert_eq!(used_and_limit(&sources), [(70, 128), (150, 256)]);
    }

    #[test]
    fn a_figure_of_the_operators_counts_for_the_process_beside_the_groups() {
        let root = tempfile::tempdir().unwrap();
        let me = std::process::id().to_string();
        write(
            &root.path().join("mine"),
            &[
                ("memory.max", "max"),
                ("memory.current", "3145728"),
                ("memory.stat", ""),
                ("cgroup.procs", &me),
            ],
        );
        let groups = Group::around("0::/mine", root.path());

        let alone = Sources::of(groups.clone(), 100 * MIB, MACHINE);
        let own = |sources: &Sources, sessions| sources.measure(sessions).last().copied().flatten().unwrap();
        assert_eq!((own(&alone, 0).used / MIB, own(&alone, 0).limit / MIB), (3, 100));
        write(&root.path().join("mine"), &[("cgroup.procs", &format!("1\n{me}\n"))]);
        assert_eq!(
            own(&alone, 0).used / MIB,
            3,
            "a process that joins later changes nothing"
        );

        let among_others = Sources::of(groups, 100 * MIB, MACHINE);
        let usage = own(&among_others, 0);
        // No process that runs these tests is as small as the cgroup's counter says.
        assert_ne!(usage.used / MIB, 3, "the memory of other processes is not counted");
        let with_devices = own(&among_others, 10_000);
        assert!(with_devices.used >= usage.used + 10_000 * SOCKET_BYTES - 10 * MIB);
    }

    #[test]
    fn group_that_is_slowed_down_before_its_limit_is_limited_from_there() {
        let root = tempfile::tempdir().unwrap();
        write(
            &root.path().join("a"),
            &[
                ("memory.max", "268435456"),
                ("memory.high", "134217728"),
                ("memory.current", "52428800"),
                ("memory.stat", ""),
            ],
        );
        write(&root.path().join("b"), &[("memory.max", "max"), ("memory.high", "max")]);
        let limit = |group| Group::around(group, root.path())[0].limit(MACHINE);

        assert_eq!(limit("0::/a"), Some(128 * MIB));
        assert_eq!(limit("0::/b"), None);
    }

    #[test]
    fn without_a_group_that_has_a_limit_the_whole_machine_counts_whoever_uses_it() {
        let root = tempfile::tempdir().unwrap();
        let mut sources = Sources::of(Group::around("0::/nowhere", root.path()), 0, MACHINE);
        sources.meminfo = root.path().join("meminfo");
        let says = |available: u64| {
            let text = format!(
                "MemTotal:        8388608 kB\nMemFree:           1 kB\nMemAvailable:   {} kB\n",
                available * 1024
            );
            fs::write(root.path().join("meminfo"), text).unwrap();
        };
        says(1_024);
        assert_eq!(used_and_limit(&sources), [(7 * 1024, 8 * 1024)]);
        let memory = Memory::new(sources);

        says(500);
        assert!(memory.measure(0).is_some_and(|usage| usage.fullness() > 1.0));

        assert!(memory.is_full() && !memory.has_room());
        fs::remove_file(root.path().join("meminfo")).unwrap();
        memory.measure(0);
        assert!(memory.is_full(), "no measurement shows that it ended");
        says(1_024);
        memory.measure(0);
        assert!(!memory.is_full());
        assert!(Sources::of_process(0).measure(0).iter().all(Option::is_some));
    }

    #[test]
    fn process_alone_in_a_group_without_counters_is_measured_by_itself() {
        let root = tempfile::tempdir().unwrap();
        write(
            &root.path().join("mine"),
            &[("cgroup.procs", &std::process::id().to_string())],
        );
        let sources = Sources::of(Group::around("0::/mine", root.path()), 100 * MIB, MACHINE);

        assert!(sources.measure(0).last().copied().flatten().is_some());
    }

    #[test]
    fn limit_that_is_never_measured_keeps_nobody_out_for_long() {
        let root = tempfile::tempdir().unwrap();
        let mut sources = Sources::of(Vec::new(), 8 << 40, MACHINE);
        sources.meminfo = root.path().join("hidden");
        let memory = Arc::new(Memory::new(sources));
        memory.guard().handle_measured(&[Some(Usage { used: 1, limit: 1 })]);

        for _ in 0..UNREADABLE_MAX {
            assert!(memory.take().is_none());
            memory.measure(0);
        }

        // More than can fit at a time.
        for _ in 0..10 {
            memory.take().unwrap().commit();
            memory.measure(0);
        }
    }

    #[test]
    fn group_that_cannot_be_read_any_more_is_as_full_as_it_was() {
        let root = tempfile::tempdir().unwrap();
        let group = root.path().join("a");
        let full = [
            ("memory.max", "134217728"),
            ("memory.current", "134217728"),
            ("memory.stat", ""),
        ];
        write(&group, &full);
        let memory = Memory::new(Sources::of(Group::around("0::/a", root.path()), 0, MACHINE));
        memory.measure(0);
        assert!(memory.is_full());

        fs::remove_dir_all(&group).unwrap();
        memory.measure(0);
        assert!(memory.is_full());

        write(&group, &full);
        write(&group, &[("memory.current", "1048576")]);
        memory.measure(0);
        assert!(!memory.is_full());
    }
}
