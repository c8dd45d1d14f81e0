//! Inputs made from a kept corpus: its files cut, doubled, spliced and damaged. Start with [`inputs`].
//!
//! `PROPTEST_CASES` sets how many of each kind are tried (default 256). A run that fails prints the smallest failing
//! input. Keep it as a file of the corpus, so that every later run tries it.

use std::{fs, path::Path};

use proptest::{prelude::*, sample::Index, test_runner::FileFailurePersistence};

/// Maximum length of an input, in bytes: above every limit of the parsers.
const LEN_MAX: usize = 96 * 1024;
/// Sequences that often break parsers.
const TOKENS: [&[u8]; 24] = [
    b"\0",
    b"\r\n",
    b"\r\n\r\n",
    b"\xff\xfe",
    "\u{fe0f}\u{202e}".as_bytes(),
    b"%00%ff%",
    b"\"",
    b"\\u0000",
    b"{",
    b"}",
    b"[[",
    b":",
    b",,",
    b"=",
    b"~",
    b"-",
    b"..",
    b"*",
    b"99999999999999999999999999999999",
    b"-1",
    b"1e999",
    b"NaN",
    b"null",
    b" \t",
];

#[derive(Clone, Debug)]
enum Change {
    Flip { at: Index, bit: u8 },
    Insert { at: Index, bytes: Vec<u8> },
    Token { at: Index, which: Index },
    Cut { at: Index, len: Index },
    Repeat { at: Index, len: Index, times: u8 },
    Splice { at: Index, seed: Index, from: Index },
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<Index>;
    prop_oneof![
        3 => (at(), 0_u8..8).prop_map(|(at, bit)| Change::Flip { at, bit }),
        2 => (at(), prop::collection::vec(any::<u8>(), 1..6)).prop_map(|(at, bytes)| Change::Insert { at, bytes }),
        4 => (at(), at()).prop_map(|(at, which)| Change::Token { at, which }),
        2 => (at(), at()).prop_map(|(at, len)| Change::Cut { at, len }),
        1 => (at(), at(), 1_u8..100).prop_map(|(at, len, times)| Change::Repeat { at, len, times }),
        1 => (at(), at(), at()).prop_map(|(at, seed, from)| Change::Splice { at, seed, from }),
    ]
}

impl Change {
    fn apply(&self, input: &mut Vec<u8>, seeds: &[Vec<u8>]) {
        let len = input.len();
        match self {
            Self::Flip { at, bit } if len > 0 => input[at.index(len)] ^= 1 << bit,
            Self::Flip { .. } => {}
            Self::Insert { at, bytes } => insert(input, at.index(len + 1), bytes),
            Self::Token { at, which } => insert(input, at.index(len + 1), TOKENS[which.index(TOKENS.len())]),
            Self::Cut { at, len: cut } => {
                let from = at.index(len + 1);
                let to = from + cut.index(len - from + 1);
                input.drain(from..to);
            }
            Self::Repeat { at, len: part, times } => {
                let from = at.index(len + 1);
                let part = input[from..from + part.index(len - from + 1)].repeat((*times).into());
                insert(input, from, &part);
            }
            Self::Splice { at, seed, from } => {
                let seed = &seeds[seed.index(seeds.len())];
                let from = from.index(seed.len() + 1);
                input.truncate(at.index(len + 1));
                input.extend_from_slice(&seed[from..]);
            }
        }
        input.truncate(LEN_MAX);
    }
}

fn insert(input: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    input.splice(at..at, bytes.iter().copied());
}

/// The files of this folder.
pub fn corpus(folder: &Path) -> Vec<Vec<u8>> {
    let mut files: Vec<_> = fs::read_dir(folder)
        .unwrap_or_else(|error| panic!("{}: {error}", folder.display()))
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Each file of the folder, with some or no changes.
pub fn inputs(folder: &Path) -> impl Strategy<Value = Vec<u8>> + use<> {
    let seeds = corpus(folder);
    assert!(!seeds.is_empty(), "{} has no files", folder.display());
    (any::<Index>(), prop::collection::vec(change(), 0..8)).prop_map(move |(which, changes)| {
        let mut input = seeds[which.index(seeds.len())].clone();
        for change in &changes {
            change.apply(&mut input, &seeds);
        }
        input
    })
}

/// Failing inputs are also stored in this file, and tried first in the next run.
pub fn settings(failures: &'static str) -> ProptestConfig {
    ProptestConfig {
        failure_persistence: Some(Box::new(FileFailurePersistence::Direct(failures))),
        ..ProptestConfig::default()
    }
}
