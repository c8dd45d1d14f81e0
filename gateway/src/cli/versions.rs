//! `seawall versions`: the order of firmware versions, and what a range matches, without a gateway.

use std::{
    fs::File,
    io::{self, Read, Write},
    path::{Path, PathBuf},
};

use clap::Subcommand;
use seawall_proto::firmware::{Range, compare};

use super::Failure;

/// Greatest list that is read: it is sorted in memory.
const LIST_BYTES_MAX: u64 = 256 * 1024 * 1024;

#[derive(Debug, Subcommand)]
pub enum Versions {
    /// Print the lines in the order of versions, oldest first; lines that are equal in it keep their order
    Sort {
        /// The file; not given or `-`: standard input
        file: Option<PathBuf>,
    },
    /// Print the lines that a range matches
    Match {
        /// As in '>=3.8.0-b3', '3.8.*' or '>=3.8,<3.9'
        #[arg(allow_hyphen_values = true)]
        range: String,
        /// The file; not given or `-`: standard input
        file: Option<PathBuf>,
    },
}

pub fn run(verb: Versions) -> Result<(), Failure> {
    match verb {
        Versions::Sort { file } => print(&sorted(&read(file.as_deref())?)),
        Versions::Match { range, file } => {
            let range: Range = range
                .parse()
                .map_err(|error| Failure::WrongUse(format!("RANGE: {error}")))?;
            print(&matching(&read(file.as_deref())?, &range))
        }
    }
}

/// The lines in the order of versions, each unchanged; equal ones in the order they came.
fn sorted(list: &[u8]) -> Vec<&[u8]> {
    let mut lines: Vec<_> = lines(list)
        .map(|line| (String::from_utf8_lossy(line.trim_ascii()), line))
        .collect();
    lines.sort_by(|(left, _), (right, _)| compare(left, right));
    lines.into_iter().map(|(_, line)| line).collect()
}

/// The lines that the range matches, unchanged. An empty line is a missing version, as an empty header is.
fn matching<'a>(list: &'a [u8], range: &Range) -> Vec<&'a [u8]> {
    let is_matched = |line: &&[u8]| {
        let text = String::from_utf8_lossy(line.trim_ascii());
        range.matches((!text.is_empty()).then_some(&*text))
    };
    lines(list).filter(is_matched).collect()
}

/// Without their line feeds. What follows the last line feed is a line only if there is something.
fn lines(list: &[u8]) -> impl Iterator<Item = &[u8]> {
    list.strip_suffix(b"\n")
        .unwrap_or(list)
        .split(|byte| *byte == b'\n')
        .filter(|_| !list.is_empty())
}

fn read(file: Option<&Path>) -> Result<Vec<u8>, Failure> {
    let named = file.filter(|file| file.as_os_str() != "-");
    let shown = named.map_or_else(|| "standard input".to_owned(), |file| file.display().to_string());
    let mut list = Vec::new();
    let read = match named {
        Some(file) => File::open(file).and_then(|file| file.take(LIST_BYTES_MAX + 1).read_to_end(&mut list)),
        None => io::stdin().take(LIST_BYTES_MAX + 1).read_to_end(&mut list),
    };
    let len = read.map_err(|error| Failure::failed(format!("{shown}: {error}")))?;
    if u64::try_from(len).is_ok_and(|len| len > LIST_BYTES_MAX) {
        return Err(Failure::failed(format!("{shown}: over 256 MiB")));
    }
    Ok(list)
}

fn print(lines: &[&[u8]]) -> Result<(), Failure> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    for line in lines {
        out.write_all(line)?;
        out.write_all(b"\n")?;
    }
    out.flush()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_sorted_stably_and_unchanged() {
        let list = b"3.8.0\r\n3.8.0-b10\n v3.8\nFW_3.8.0-b3\n\xff\n\n3.10";

        let lines = sorted(list);

        let expected: [&[u8]; 7] = [
            b"",
            b"\xff",
            b"FW_3.8.0-b3",
            b"3.8.0-b10",
            b"3.8.0\r",
            b" v3.8",
            b"3.10",
        ];
        assert_eq!(lines, expected);
    }

    #[test]
    fn empty_line_is_a_missing_version() {
        let list = b"3.8.0-b3\n\n3.7\nnightly\n";

        assert_eq!(matching(list, &"=(none)".parse().unwrap()), [b"" as &[u8]]);
        assert_eq!(matching(list, &">=3.8.0-b3".parse().unwrap()), [b"3.8.0-b3" as &[u8]]);
        assert_eq!(matching(b"", &"=(none)".parse().unwrap()), [] as [&[u8]; 0]);
    }
}
