//! Changes that wait for the database, on disk: one line each, oldest first. Start with [`Journal`]. Changes of rules
//! have one, and [records of the audit log](crate::fleet::audit_journal) another.
//!
//! A line is a checksum and JSON. It is on disk when [`Journal::append`] has returned. A last line without its end was
//! never acknowledged, and is dropped. Before any other invalid line is removed from the file, the whole file is
//! copied. There is no file while no change waits.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Seek as _, SeekFrom, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use data_encoding::HEXLOWER;
use seawall_proto::rules::LocalWrite;
use serde::{Serialize, de::DeserializeOwned};
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::runtime::data_dir::{read_bounded, write_atomically};

/// A change, as a line of a journal.
pub(crate) trait Entry: Clone + PartialEq + Serialize + DeserializeOwned {
    /// File of the journal in the data directory.
    const FILE: &'static str;
    /// Name of a copy of a journal that could not be read completely, followed by the first free number.
    const DAMAGED_FILE: &'static str;
    /// What the journal is of, for people.
    const OF: &'static str;

    fn id(&self) -> Uuid;
}

impl Entry for LocalWrite {
    const FILE: &'static str = "rules-journal.jsonl";
    const DAMAGED_FILE: &'static str = "rules-journal.damaged";
    const OF: &'static str = "rules";

    fn id(&self) -> Uuid {
        self.id
    }
}

/// Maximum number of waiting changes. A further one is refused.
pub const WRITES_MAX: usize = 1_000;
/// Maximum length of the file, in bytes. A change that does not fit is refused.
const BYTES_MAX: u64 = 8 << 20;
/// Digits of a line's checksum.
const SUM_LEN: usize = 16;

/// Why a change cannot be kept on disk. It is not in force then.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    #[error("the disk of the data directory is full: free space")]
    DiskFull,
    #[error("{WRITES_MAX} changes, or {} MiB of them, wait already", BYTES_MAX >> 20)]
    Full,
    #[error("the rule was changed meanwhile: read it again")]
    Changed,
    #[error("the change could not be read back from its line")]
    Unreadable,
    #[error("{} can't be written: {error}", path.display())]
    Io { path: PathBuf, error: io::Error },
}

/// The file and its content.
#[derive(Debug)]
pub(crate) struct Journal<T = LocalWrite> {
    path: PathBuf,
    /// Length of the complete lines.
    len: u64,
    writes: Vec<T>,
    /// The file has unreadable lines and must be copied before it is rewritten.
    is_uncopied: bool,
}

impl<T: Entry> Journal<T> {
    /// Reads the journal of an earlier process. The text describes unreadable lines, if any.
    pub fn open(data_dir: &Path) -> (Self, Option<String>) {
        let mut journal = Self {
            path: data_dir.join(T::FILE),
            len: 0,
            writes: Vec::new(),
            is_uncopied: false,
        };
        let bytes = match read_bounded(&journal.path, BYTES_MAX) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return (journal, None),
            Err(error) => {
                let damage = journal.put_aside(&error.to_string());
                return (journal, Some(damage));
            }
        };
        let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
        if end < bytes.len() {
            tracing::warn!(file = %journal.path.display(), of = T::OF, "last change in the journal was incomplete and never acknowledged: dropped");
        }
        let (mut lines, mut bad) = (0, 0);
        for line in bytes[..end].split_inclusive(|byte| *byte == b'\n') {
            lines += 1;
            match parse(line) {
                Some(write) => journal.writes.push(write),
                None => bad += 1,
            }
        }
        journal.len = end as u64;
        let damage = (bad > 0).then(|| {
            journal.is_uncopied = true;
            let copied = journal.replace(journal.writes.clone()).err().map_or_else(
                || format!("a copy is kept beside it as {}-1, or with the highest number", T::DAMAGED_FILE),
                |error| format!("it could not be copied yet: {error}"),
            );
            let damage = format!(
                "{bad} of the {lines} lines in the journal of {} ({}) are damaged, or of a later version: {copied}. Check which changes are missing and repeat them",
                T::OF,
                journal.path.display()
            );
            tracing::error!(damage, "journal is damaged");
            damage
        });
        (journal, damage)
    }

    /// Waiting changes, oldest first.
    pub fn writes(&self) -> &[T] {
        &self.writes
    }

    /// Keeps a change. It is on disk when this returns.
    ///
    /// # Errors
    /// It could not be written.
    pub fn append(&mut self, write: T) -> Result<(), JournalError> {
        let line = line(&write);
        if parse::<T>(&line).as_ref() != Some(&write) {
            return Err(JournalError::Unreadable);
        }
        if self.writes.len() >= WRITES_MAX || self.len + line.len() as u64 > BYTES_MAX {
            return Err(JournalError::Full);
        }
        self.append_line(&line).map_err(|error| {
            // A part that may have reached the file must not be read later.
            let _ = OpenOptions::new()
                .write(true)
                .open(&self.path)
                .and_then(|file| file.set_len(self.len));
            self.failed(error)
        })?;
        self.len += line.len() as u64;
        self.writes.push(write);
        Ok(())
    }

    fn append_line(&self, line: &[u8]) -> io::Result<()> {
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600);
        let mut file = options.open(&self.path)?;
        // Removes what an interrupted write left after the last complete line.
        file.set_len(self.len)?;
        file.seek(SeekFrom::End(0))?;
        file.write_all(line)?;
        file.sync_all()?;
        if self.len == 0 {
            self.sync_folder()?;
        }
        Ok(())
    }

    /// Drops these changes, which the database has.
    ///
    /// # Errors
    /// The file cannot be written. They stay: the database applies none of them twice.
    pub fn drop_moved(&mut self, moved: &[Uuid]) -> Result<(), JournalError> {
        let rest = self.writes.iter().filter(|write| !moved.contains(&write.id()));
        let rest = rest.cloned().collect();
        self.replace(rest)
    }

    fn replace(&mut self, writes: Vec<T>) -> Result<(), JournalError> {
        if self.is_uncopied {
            self.copy_aside().map_err(|error| self.failed(error))?;
            self.is_uncopied = false;
        }
        let text: Vec<u8> = writes.iter().flat_map(line).collect();
        let replaced = if writes.is_empty() {
            match fs::remove_file(&self.path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                Ok(()) | Err(_) => self.sync_folder(),
            }
        } else {
            write_atomically(&self.path, &text, 0o600)
        };
        replaced.map_err(|error| self.failed(error))?;
        self.len = text.len() as u64;
        self.writes = writes;
        Ok(())
    }

    fn sync_folder(&self) -> io::Result<()> {
        let folder = self.path.parent().filter(|folder| !folder.as_os_str().is_empty());
        File::open(folder.unwrap_or(Path::new(".")))?.sync_all()
    }

    /// A free name beside the journal.
    fn free_name(&self) -> PathBuf {
        let names = (1_u32..).map(|number| self.path.with_file_name(format!("{}-{number}", T::DAMAGED_FILE)));
        let mut free = names.skip_while(|name| name.symlink_metadata().is_ok());
        free.next().unwrap_or_else(|| self.path.with_file_name(T::DAMAGED_FILE))
    }

    fn copy_aside(&self) -> io::Result<()> {
        let name = self.free_name();
        let copy = || {
            fs::copy(&self.path, &name)?;
            File::open(&name)?.sync_all()?;
            self.sync_folder()
        };
        copy().inspect_err(|_| drop(fs::remove_file(&name)))
    }

    /// Renames a journal that cannot be read at all.
    fn put_aside(&mut self, why: &str) -> String {
        let name = self.free_name();
        let kept = match fs::rename(&self.path, &name) {
            Ok(()) => name,
            Err(error) => {
                tracing::error!(%error, of = T::OF, "damaged journal could not be renamed: it takes no changes");
                self.len = BYTES_MAX;
                self.path.clone()
            }
        };
        let damage = format!(
            "the journal of {} can't be read ({why}): it is kept as {}, check which changes are missing and repeat them",
            T::OF,
            kept.display()
        );
        tracing::error!(damage, "journal is damaged");
        damage
    }

    fn failed(&self, error: io::Error) -> JournalError {
        if matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded) {
            return JournalError::DiskFull;
        }
        JournalError::Io {
            path: self.path.clone(),
            error,
        }
    }
}

fn line(write: &impl Serialize) -> Vec<u8> {
    // Texts and numbers have a JSON form.
    let json = serde_json::to_vec(write).unwrap_or_default();
    [sum(&json).as_bytes(), b" ", &json, b"\n"].concat()
}

fn sum(json: &[u8]) -> String {
    let mut sum = HEXLOWER.encode(&Sha256::digest(json));
    sum.truncate(SUM_LEN);
    sum
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> Option<T> {
    let (found, json) = line.strip_suffix(b"\n")?.split_at_checked(SUM_LEN)?;
    let json = json.strip_prefix(b" ")?;
    (found == sum(json).as_bytes())
        .then(|| serde_json::from_slice(json).ok())
        .flatten()
}

#[cfg(test)]
mod tests {
    use seawall_proto::{
        id::RuleId,
        rules::{Effect, Match, RuleSpec},
        time::WallTime,
    };

    use super::*;

    const FILE: &str = LocalWrite::FILE;
    const DAMAGED_FILE: &str = LocalWrite::DAMAGED_FILE;

    fn write(number: u128) -> LocalWrite {
        LocalWrite {
            id: Uuid::from_u128(number),
            rule: RuleId(Uuid::from_u128(number)),
            at: WallTime::from_unix_ms(1),
            actor: "ada".into(),
            is_confirmed: true,
            before: None,
            after: Some(RuleSpec::new(Match::default(), Effect::Block)),
        }
    }

    fn numbers(journal: &Journal) -> Vec<u128> {
        journal.writes().iter().map(|write| write.id.as_u128()).collect()
    }

    fn filled(home: &Path, count: u128) -> Journal {
        let (mut journal, damage) = Journal::open(home);
        assert_eq!(damage, None);
        for number in 1..=count {
            journal.append(write(number)).unwrap();
        }
        journal
    }

    #[test]
    fn changes_are_read_back_in_order_and_the_file_is_gone_with_the_last() {
        let home = tempfile::tempdir().unwrap();
        let mut journal = filled(home.path(), 3);

        assert_eq!(numbers(&Journal::open(home.path()).0), [1, 2, 3]);
        journal.drop_moved(&[Uuid::from_u128(1)]).unwrap();
        journal.append(write(4)).unwrap();
        let (again, damage) = Journal::open(home.path());
        assert_eq!((numbers(&again), damage), (vec![2, 3, 4], None));
        assert_eq!(again.writes(), journal.writes());
        journal.drop_moved(&[2, 3, 4].map(Uuid::from_u128)).unwrap();

        assert!(!home.path().join(FILE).exists());
        assert_eq!(numbers(&Journal::open(home.path()).0), [0_u128; 0]);
    }

    #[test]
    fn last_line_that_is_cut_anywhere_is_dropped_and_overwritten() {
        let home = tempfile::tempdir().unwrap();
        drop(filled(home.path(), 2));
        let file = home.path().join(FILE);
        let whole = fs::read(&file).unwrap();
        let first = whole.iter().position(|byte| *byte == b'\n').unwrap() + 1;

        for len in first..whole.len() {
            fs::write(&file, &whole[..len]).unwrap();
            let (mut journal, damage) = Journal::open(home.path());
            assert_eq!((numbers(&journal), damage), (vec![1], None), "{len}");
            journal.append(write(3)).unwrap();
            assert_eq!(numbers(&Journal::open(home.path()).0), [1, 3]);
        }
    }

    #[test]
    fn last_whole_line_that_can_not_be_read_is_kept_in_a_copy_and_told() {
        let home = tempfile::tempdir().unwrap();
        drop(filled(home.path(), 1));
        let file = home.path().join(FILE);
        let first = fs::read(&file).unwrap();
        let later = br#"{"id":"of a later version"}"#;
        let by_a_later_version = [sum(later).as_bytes(), b" ", later, b"\n"].concat();
        let mut holes = line(&write(2));
        holes[40..].fill(0);
        *holes.last_mut().unwrap() = b'\n';

        for (number, last) in (1..).zip([by_a_later_version, holes]) {
            let whole = [&first[..], &last].concat();
            fs::write(&file, &whole).unwrap();

            let (journal, damage) = Journal::open(home.path());

            assert_eq!(numbers(&journal), [1]);
            assert!(damage.unwrap().contains("1 of the 2 lines"));
            let copy = home.path().join(format!("{DAMAGED_FILE}-{number}"));
            assert_eq!(fs::read(copy).unwrap(), whole);
            assert_eq!(fs::read(&file).unwrap(), first);
        }
    }

    #[test]
    fn damaged_line_in_the_middle_is_told_and_the_others_are_kept() {
        let home = tempfile::tempdir().unwrap();
        drop(filled(home.path(), 3));
        let file = home.path().join(FILE);
        let text = fs::read_to_string(&file).unwrap();
        fs::write(&file, text.replacen("\"ada\"", "\"eve\"", 1)).unwrap();

        let (journal, damage) = Journal::open(home.path());

        assert_eq!(numbers(&journal), [2, 3]);
        assert!(damage.unwrap().contains("1 of the 3 lines"));
        assert!(home.path().join("rules-journal.damaged-1").exists());
        let (again, damage) = Journal::open(home.path());
        assert_eq!((numbers(&again), damage), (vec![2, 3], None));
    }

    #[test]
    fn number_of_changes_is_bounded() {
        let home = tempfile::tempdir().unwrap();
        let (mut journal, _) = Journal::open(home.path());
        journal.writes = vec![write(1); WRITES_MAX];

        assert!(matches!(journal.append(write(2)), Err(JournalError::Full)));
    }

    #[test]
    fn change_that_can_not_be_written_leaves_nothing_behind() {
        let home = tempfile::tempdir().unwrap();
        let mut journal = filled(home.path(), 1);
        let elsewhere = home.path().join("gone");
        let path = std::mem::replace(&mut journal.path, elsewhere.join(FILE));

        let failed = journal.append(write(2));

        assert!(matches!(failed, Err(JournalError::Io { .. })));
        assert_eq!(numbers(&journal), [1]);
        journal.path = path;
        journal.append(write(3)).unwrap();
        assert_eq!(numbers(&Journal::open(home.path()).0), [1, 3]);
    }
}
