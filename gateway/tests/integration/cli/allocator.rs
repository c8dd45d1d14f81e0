//! The allocator's settings, which are set at build time and could get lost.

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::harness::process::{run, seawall};

#[test]
fn allocator_has_the_settings_that_were_measured() {
    let output = run(seawall().arg("--version").env("_RJEM_MALLOC_CONF", "confirm_conf:true")).unwrap();

    let said = String::from_utf8(output.stderr).unwrap();
    for setting in [
        "narenas:4",
        "background_thread:true",
        "dirty_decay_ms:1000",
        "muzzy_decay_ms:0",
    ] {
        assert!(
            said.contains(&format!("Set conf value: {setting}\n")),
            "{setting}: {said}"
        );
    }
}

#[test]
fn nothing_is_said_about_cores_where_only_some_may_be_used() {
    let allowed = sched_getaffinity(None).unwrap();
    let first = (0..CpuSet::MAX_CPU).find(|core| allowed.is_set(*core)).unwrap();
    let mut one = CpuSet::new();
    one.set(first);
    // For this thread and its child processes.
    sched_setaffinity(None, &one).unwrap();

    let output = run(seawall().arg("--version")).unwrap();

    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}
