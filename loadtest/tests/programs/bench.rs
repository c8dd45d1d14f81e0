//! `loadtest bench`, small: all figures are there, and the page can be written.

use std::{fs, process::Command};

use crate::{LOADTEST, seawall, told};

#[test]
fn bench_measures_the_gateway_beside_the_echo_and_writes_its_page() {
    seawall();
    let folder = tempfile::tempdir().unwrap();
    let page = folder.path().join("page.md");

    let done = Command::new(LOADTEST)
        .args([
            "bench",
            "--devices",
            "500",
            "--database",
            "sqlite",
            "--hold",
            "2s",
            "--write",
        ])
        .arg(&page)
        .output()
        .unwrap();

    assert!(done.status.success(), "{}", told(&done));
    let page = fs::read_to_string(&page).unwrap();
    let told = String::from_utf8(done.stdout).unwrap();
    let table = told.get(told.find('|').unwrap()..).unwrap(); // what it does comes first
    assert!(page.contains(table), "{page}");
    assert!(
        page.contains("bench --devices 500 --database sqlite --hold 2s"),
        "{page}"
    );
    let figures = table.lines().skip(2).map(|line| line.split('|').nth(2).unwrap().trim());
    let figures: Vec<f64> = figures
        .map(|figure| figure.split(' ').next().unwrap().parse().unwrap())
        .collect();
    assert_eq!(figures.len(), 17, "{table}");
    assert!(figures.iter().all(|figure| *figure > 0.0), "{table}");
}
