//! `loadtest scale`, small: two gateways on one address hold all devices, which return by token to either.

use std::{fs, process::Command};

use crate::{LOADTEST, seawall, told};

#[test]
fn gateways_on_one_address_hold_a_fleet_in_several_processes() {
    seawall();
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.md");

    let done = Command::new(LOADTEST)
        .args(["scale", "--devices", "400", "--hold", "1s", "--write"])
        .arg(&page)
        .output()
        .unwrap();

    assert!(done.status.success(), "{}", told(&done));
    let page = fs::read_to_string(&page).unwrap();
    assert!(page.contains("| devices | 400 |"), "{page}");
    assert!(page.contains("| gateways | 2 |"), "{page}");
    let sessions = page
        .lines()
        .find(|line| line.starts_with("| sessions of a gateway"))
        .unwrap();
    let held = sessions.split('|').nth(2).unwrap().split(',');
    let held: Vec<u32> = held.map(|figure| figure.trim().parse().unwrap()).collect();
    assert_eq!(held.iter().sum::<u32>(), 400);
    assert!(held[0] >= 100, "the kernel spreads them: {held:?}");
}
