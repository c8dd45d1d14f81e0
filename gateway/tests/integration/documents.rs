//! Documents that name files name files that are there.

use std::path::Path;

#[test]
fn security_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("SECURITY.md")).unwrap();

    let named: Vec<&str> = text.split('`').filter(|part| part.ends_with(".rs")).collect();

    assert!(named.len() > 30, "{named:?}");
    for path in named {
        assert!(root.join(path).exists(), "{path}");
    }
}

#[test]
fn architecture_names_files_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("docs/ARCHITECTURE.md")).unwrap();
    let (_, table) = text.split_once("## Where is").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();

    let named: Vec<&str> = table.split('`').skip(1).step_by(2).collect();

    assert!(named.len() > 30, "{named:?}");
    for path in named {
        assert!(path.contains('/') && root.join(path).exists(), "{path}");
    }
}
