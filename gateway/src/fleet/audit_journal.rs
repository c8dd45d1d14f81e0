//! Records of the audit log that the database could not take: on disk, until it can. For changes that are not in the
//! database themselves, such as a drain. Start with [`AuditJournal`].

use std::{
    path::Path,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};

use uuid::Uuid;

use super::rules::{
    JournalError,
    journal::{Entry, Journal},
};
use crate::store::AuditEntry;

impl Entry for AuditEntry {
    const FILE: &'static str = "audit-journal.jsonl";
    const DAMAGED_FILE: &'static str = "audit-journal.damaged";
    const OF: &'static str = "audit records";

    fn id(&self) -> Uuid {
        self.id
    }
}

/// The records that wait, oldest first. Its calls write to the disk: make them on a blocking thread.
#[derive(Debug)]
pub struct AuditJournal {
    journal: Mutex<Journal<AuditEntry>>,
    len: AtomicUsize,
}

impl AuditJournal {
    /// Reads what an earlier process left. Damage is in the log.
    #[must_use]
    pub fn open(data_dir: &Path) -> Self {
        let (journal, _) = Journal::open(data_dir);
        Self {
            len: AtomicUsize::new(journal.writes().len()),
            journal: Mutex::new(journal),
        }
    }

    /// Whether no record waits. Does not block.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len.load(Ordering::Acquire) == 0
    }

    /// Keeps a record. It is on disk when this returns.
    ///
    /// # Errors
    /// The disk cannot take it, or too many records wait.
    pub fn keep(&self, entry: AuditEntry) -> Result<(), JournalError> {
        let mut journal = self.lock();
        let kept = journal.append(entry);
        self.len.store(journal.writes().len(), Ordering::Release);
        kept
    }

    /// The oldest records, at most `len_max`.
    #[must_use]
    pub fn oldest(&self, len_max: usize) -> Vec<AuditEntry> {
        self.lock().writes().iter().take(len_max).cloned().collect()
    }

    /// Removes records that the database has.
    ///
    /// # Errors
    /// The file cannot be written. They stay: the database takes none of them twice.
    pub fn drop_moved(&self, moved: &[Uuid]) -> Result<(), JournalError> {
        let mut journal = self.lock();
        let dropped = journal.drop_moved(moved);
        self.len.store(journal.writes().len(), Ordering::Release);
        dropped
    }

    fn lock(&self) -> MutexGuard<'_, Journal<AuditEntry>> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use seawall_proto::time::WallTime;
    use serde_json::json;

    use super::*;

    fn entry(number: u128) -> AuditEntry {
        AuditEntry {
            id: Uuid::from_u128(number),
            at: WallTime::from_unix_ms(7),
            actor: "ada".into(),
            action: "drain.start".into(),
            subject: "node".into(),
            before: None,
            after: Some(json!({"rate_per_second": 5.5, "text": "\u{e9}\n"})),
        }
    }

    #[test]
    fn records_wait_in_order_over_a_restart_and_leave_no_file() {
        let home = tempfile::tempdir().unwrap();
        let journal = AuditJournal::open(home.path());
        assert!(journal.is_empty());
        for number in 1..=3 {
            journal.keep(entry(number)).unwrap();
        }

        let again = AuditJournal::open(home.path());
        assert!(!again.is_empty());
        assert_eq!(again.oldest(2), [entry(1), entry(2)]);
        again.drop_moved(&[1, 2].map(Uuid::from_u128)).unwrap();
        assert_eq!(again.oldest(9), [entry(3)]);
        again.drop_moved(&[Uuid::from_u128(3)]).unwrap();

        assert!(again.is_empty() && !home.path().join(AuditEntry::FILE).exists());
    }

    #[test]
    fn number_of_records_is_bounded() {
        let home = tempfile::tempdir().unwrap();
        let journal = AuditJournal::open(home.path());

        let kept = (0..2_000).take_while(|number| journal.keep(entry(*number)).is_ok());

        assert_eq!(kept.count(), super::super::rules::WRITES_MAX);
    }
}
