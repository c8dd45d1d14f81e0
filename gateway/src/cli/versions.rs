//! `seawall versions`: the order of firmware versions and their ranges, tried on lists. Needs no gateway.
//!
//! Lines are printed unchanged, whatever bytes they hold. They are compared without surrounding white space. Bytes that
//! are not UTF-8 are unknown letters. Start with [`sort`] and [`matching`].

use std::{
    borrow::Cow,
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
};

use clap::Subcommand;
use seawall_proto::firmware::{Range, Version};

use super::Failure;

/// Maximum size of a list to sort, in bytes: all of it is in memory. A larger one is an error.
const SORT_LEN_MAX: u64 = 256 << 20;

/// Maximum length of a line to match, in bytes. A longer one is an error.
const LINE_LEN_MAX: u64 = 1 << 20;

#[derive(Debug, Subcommand)]
pub enum Versions {
    /// Print lines in the order of firmware versions; equal versions keep their order
    Sort {
        /// File with one version per line [default, and `-`: standard input]
        file: Option<PathBuf>,
    },
    /// Print the lines that a range matches; an empty line is a missing version
    Match {
        /// Range, such as '>=3.8.0-b3,<3.9', '3.8.*' or '=(none)'
        #[arg(allow_hyphen_values = true)]
        range: String,
        /// File with one version per line [default, and `-`: standard input]
        file: Option<PathBuf>,
    },
}

/// Runs one command on standard output.
pub fn run(verb: Versions) -> Result<(), Failure> {
    let out = BufWriter::new(io::stdout().lock());
    let (file, done) = match verb {
        Versions::Sort { file } => {
            let done = open(file.as_deref()).and_then(|input| sort(input, out));
            (file, done)
        }
        Versions::Match { range, file } => {
            let range: Range = range
                .parse()
                .map_err(|error| Failure::WrongUse(format!("RANGE: {error}")))?;
            let done = open(file.as_deref()).and_then(|input| matching(&range, input, out));
            (file, done)
        }
    };
    match done {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::OutputClosed),
        Err(error) => {
            let shown = file.map_or_else(|| "standard input".to_owned(), |file| file.display().to_string());
            Err(Failure::failed(format!("{shown}: {error}")))
        }
    }
}

/// Writes the lines of `input` in the order of versions, stable, each ended by a line feed.
///
/// # Errors
/// Reading or writing fails, or the input is longer than 256 MiB.
pub fn sort(input: impl Read, mut out: impl Write) -> io::Result<()> {
    let mut list = Vec::new();
    input.take(SORT_LEN_MAX + 1).read_to_end(&mut list)?;
    if list.len() as u64 > SORT_LEN_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more than 256 MiB to sort"));
    }
    if list.is_empty() {
        return out.flush();
    }
    let list = list.strip_suffix(b"\n").unwrap_or(&list);
    let lines: Vec<&[u8]> = list.split(|byte| *byte == b'\n').collect();
    let texts: Vec<Cow<'_, str>> = lines.iter().map(|line| String::from_utf8_lossy(line)).collect();
    let mut rows: Vec<(Version<'_>, &[u8])> = texts.iter().map(|text| Version::of(text)).zip(lines).collect();
    rows.sort_by_key(|(version, _)| *version);
    for (_, line) in rows {
        write_line(&mut out, line)?;
    }
    out.flush()
}

/// Writes the lines of `input` that `range` matches, in their order, as they arrive.
///
/// # Errors
/// Reading or writing fails, or a line is longer than 1 MiB.
pub fn matching(range: &Range, input: impl Read, mut out: impl Write) -> io::Result<()> {
    let mut input = BufReader::new(input);
    let mut line = Vec::new();
    loop {
        line.clear();
        input.by_ref().take(LINE_LEN_MAX + 1).read_until(b'\n', &mut line)?;
        if line.is_empty() {
            return out.flush();
        }
        if line.len() as u64 > LINE_LEN_MAX {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "a line is longer than 1 MiB",
            ));
        }
        let line = line.strip_suffix(b"\n").unwrap_or(&line);
        if range.matches(Some(&String::from_utf8_lossy(line))) {
            write_line(&mut out, line)?;
        }
        if input.buffer().is_empty() {
            // The next read may wait for the writer of the list.
            out.flush()?;
        }
    }
}

fn open(file: Option<&Path>) -> io::Result<Box<dyn Read>> {
    match file.filter(|file| file.as_os_str() != "-") {
        None => Ok(Box::new(io::stdin().lock())),
        Some(file) => Ok(Box::new(File::open(file)?)),
    }
}

fn write_line(out: &mut impl Write, line: &[u8]) -> io::Result<()> {
    out.write_all(line)?;
    out.write_all(b"\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sorted(list: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        sort(list, &mut out).unwrap();
        out
    }

    fn matched(range: &str, list: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        matching(&range.parse().unwrap(), list, &mut out).unwrap();
        out
    }

    #[test]
    fn lines_are_sorted_stable_and_unchanged() {
        let list = b"3.8.0\nv3.8.0-b10\n 3.8+x \r\n\nFW_3.8.0-b3\n\xff3.8.0-b2\xfe\nmain\n3.8.0";

        let out = b"\nmain\n\xff3.8.0-b2\xfe\nFW_3.8.0-b3\nv3.8.0-b10\n3.8.0\n 3.8+x \r\n3.8.0\n";
        assert_eq!(sorted(list).escape_ascii().to_string(), out.escape_ascii().to_string());
    }

    #[test]
    fn no_line_is_made_up_or_lost() {
        assert_eq!(sorted(b""), b"");
        assert_eq!(sorted(b"\n"), b"\n");
        assert_eq!(sorted(b"1"), b"1\n");
        assert_eq!(sorted(b"2\n\n1\n"), b"\n1\n2\n");
        assert_eq!(matched("=(none)", b""), b"");
        assert_eq!(matched(">=0", b"2\n1"), b"2\n1\n");
    }

    #[test]
    fn lines_that_a_range_holds_are_printed_in_their_order() {
        let list = b"3.8.0\n3.8.0-b3\n\n3.7\xff\nmain\n3.8.0-b10\r\n(none)\n";

        assert_eq!(matched(">=3.8.0-b3,<3.8", list), b"3.8.0-b3\n3.8.0-b10\r\n");
        assert_eq!(matched("=(none)", list), b"\n(none)\n");
        assert_eq!(matched("=main", list), b"main\n");
        assert_eq!(matched("<3.8", list), b"3.8.0-b3\n3.7\xff\n3.8.0-b10\r\n");
    }

    #[test]
    fn a_line_without_end_is_refused() {
        let mut out = Vec::new();

        let error = matching(&">=0".parse().unwrap(), io::repeat(b'1'), &mut out).unwrap_err();

        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }
}
