//! The gateway: sockets, databases, API and command line around the policy of `seawall_proto`.
//!
//! Its modules, in the order in which they may use each other: [`runtime`], [`store`], [`fleet`], [`metrics`],
//! [`edge`], [`session`], [`lookup`], [`node`], then [`connection`], [`ops`] and [`tasks`], [`serve`], and [`cli`].

pub mod cli;
pub mod connection;
pub mod edge;
pub mod fleet;
pub mod lookup;
pub mod metrics;
pub mod node;
pub mod ops;
pub mod runtime;
pub mod serve;
pub mod session;
pub mod store;
pub mod tasks;
pub mod tokens;

#[cfg(test)]
mod tests {
    use std::{fs, path::Path};

    /// The modules, each after those that it may use. `tasks` and later ones use the whole node.
    const ORDER: [&str; 13] = [
        "runtime",
        "store",
        "tokens",
        "fleet",
        "metrics",
        "edge",
        "session",
        "lookup",
        "node",
        "tasks",
        "connection",
        "ops",
        "serve",
    ];

    #[test]
    fn a_module_uses_only_those_before_it() {
        for (rank, module) in ORDER.iter().enumerate() {
            for file in sources(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src").join(module)) {
                let text = fs::read_to_string(&file).unwrap();
                let code = text.split("#[cfg(test)]").next().unwrap_or_default();
                for used in used_by(code) {
                    let is_before = ORDER[..=rank].contains(&used.as_str());
                    assert!(is_before, "{} uses {used}", file.display());
                }
            }
        }
    }

    fn sources(folder: &Path) -> Vec<std::path::PathBuf> {
        let mut found = Vec::new();
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.extend(sources(&path));
            } else if path.file_name().is_none_or(|name| name != "tests.rs") {
                found.push(path);
            }
        }
        found
    }

    /// The modules in paths that begin with `crate::`, including groups of imports.
    fn used_by(code: &str) -> Vec<String> {
        let is_comment = |at: usize| {
            let line = code[..at].rsplit('\n').next().unwrap_or_default();
            line.trim_start().starts_with("//")
        };
        let mut used = Vec::new();
        for (at, start) in code.match_indices("crate::").filter(|(at, _)| !is_comment(*at)) {
            let path = &code[at + start.len()..];
            let is_group = path.starts_with('{');
            let (mut depth, mut is_first, mut word) = (0, !is_group, String::new());
            for character in path.chars() {
                if is_first && (character.is_alphanumeric() || character == '_') {
                    word.push(character);
                    continue;
                }
                if !word.is_empty() {
                    used.push(std::mem::take(&mut word));
                    is_first = false;
                }
                match character {
                    '{' => depth += 1,
                    '}' => depth -= 1,
                    _ => {}
                }
                is_first |= depth == 1 && matches!(character, '{' | ',');
                if depth == 0 {
                    break;
                }
            }
        }
        used
    }

    #[test]
    fn imports_are_read_in_groups_and_alone() {
        let code = "use crate::{\n    a::{b, c},\n    d,\n    e::f::{self, g},\n};\nuse crate::h::i;\n// crate::j\nfn k() { crate::l::m() }";

        assert_eq!(used_by(code), ["a", "d", "e", "h", "l"]);
    }
}
