//! The revocations known to this node, on disk: a journal of lines, compacted once it has grown. Start with
//! [`Journal`].
//!
//! A line adds to the previous ones, and repeating it changes nothing. Queued lines are on disk when
//! [`Journal::persist`] has returned. Calls during a write share the next one.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    mem,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use seawall_proto::{
    id::DeviceId,
    resume::{Generation, Revoked},
};
use serde::{Deserialize, Serialize};

use crate::runtime::data_dir::{read_bounded, write_atomically};

/// File of the revocations in the data directory: at most [`REVOKED_MAX`](seawall_proto::resume::REVOKED_MAX) devices
/// and [`LINES_MAX`] further lines, 70 bytes each.
pub(super) const FILE: &str = "revoked.jsonl";
/// The file of earlier versions: one JSON text. It is also read, and removed once its content is in the journal.
const OLD_FILE: &str = "revoked.json";
/// Maximum length of the file, several times the longest that is written, in bytes.
const BYTES_MAX: u64 = 32 << 20;
/// Maximum number of appended lines before the journal is compacted.
const LINES_MAX: usize = 4_096;

/// A line: the revocation of a device, or the revision up to which all revocations are known.
#[derive(Default, Serialize, Deserialize)]
pub(super) struct Line {
    #[serde(skip_serializing_if = "Option::is_none")]
    device: Option<DeviceId>,
    #[serde(skip_serializing_if = "Option::is_none")]
    at: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    known: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    floor: Option<u32>,
}

impl Line {
    pub fn revoked(device: DeviceId, at: Generation) -> Self {
        Self {
            device: Some(device),
            at: Some(at.0),
            ..Self::default()
        }
    }

    pub fn known(revoked: &Revoked) -> Self {
        Self {
            known: Some(revoked.known().0),
            floor: Some(revoked.floor().0),
            ..Self::default()
        }
    }
}

#[derive(Deserialize)]
struct Old {
    known: u32,
    floor: u32,
    devices: Vec<(DeviceId, u32)>,
}

/// The file, and the lines to write.
pub(super) struct Journal {
    path: PathBuf,
    queued: Mutex<Queued>,
    writer: tokio::sync::Mutex<Writer>,
}

#[derive(Default)]
struct Queued {
    text: Vec<u8>,
    lines: usize,
}

#[derive(Default)]
struct Writer {
    /// Open for appending; `None` if the whole file is written next.
    file: Option<File>,
    /// Number of lines appended since the whole file was written.
    lines: usize,
    is_failing: bool,
}

impl Journal {
    pub fn new(data_dir: &Path) -> Self {
        Self {
            path: data_dir.join(FILE),
            queued: Mutex::default(),
            writer: tokio::sync::Mutex::default(),
        }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The revocations that an earlier process knew; `None` if none were kept. An earlier version may have written its
    /// file after a later one had written the journal, so both files are used.
    ///
    /// # Errors
    /// A file cannot be read, or is damaged: then no revocations are known.
    pub fn read(&self) -> io::Result<Option<Revoked>> {
        let journal = match read_bounded(&self.path, BYTES_MAX) {
            Ok(bytes) => Some(parse(&bytes)?),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        Ok(match (journal, self.read_old()?) {
            (Some(mut journal), Some(old)) => {
                journal.raise(old.floor());
                for (device, at) in old.devices() {
                    journal.revoke(device, at);
                }
                journal.confirm(old.known());
                Some(journal)
            }
            (journal, old) => journal.or(old),
        })
    }

    fn read_old(&self) -> io::Result<Option<Revoked>> {
        let old: Old = match read_bounded(&self.old_path(), BYTES_MAX) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(io::Error::other)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let devices = old.devices.into_iter().map(|(device, at)| (device, Generation(at)));
        Ok(Some(Revoked::of(Generation(old.known), Generation(old.floor), devices)))
    }

    fn old_path(&self) -> PathBuf {
        self.path.with_file_name(OLD_FILE)
    }

    /// Queues the lines of known revocations. Call it after they are in force, and before [`persist`](Self::persist).
    pub fn queue(&self, lines: impl IntoIterator<Item = Line>) {
        let queued = &mut *self.queued();
        for line in lines {
            // Beyond that the whole file is written.
            if queued.lines <= LINES_MAX {
                append(&mut queued.text, &line);
                queued.lines += 1;
            }
        }
    }

    /// The known revocations did not only grow: the whole file must be written.
    pub fn queue_whole(&self) {
        *self.queued() = Queued {
            text: Vec::new(),
            lines: LINES_MAX + 1,
        };
    }

    /// Writes the queued lines to disk. A failure is logged and the file removed: a start without a database must not
    /// use an older one. `whole` returns all known revocations.
    pub async fn persist(&self, whole: impl FnOnce() -> Vec<u8>) {
        let writer = &mut *self.writer.lock().await;
        let queued = mem::take(&mut *self.queued());
        if queued.lines == 0 && writer.file.is_some() {
            // The previous holder of the lock has written them.
            return;
        }
        let appended = writer.lines + queued.lines;
        let to_append = writer.file.take().filter(|_| appended <= LINES_MAX);
        let (path, old) = (self.path.clone(), self.old_path());
        let work: Box<dyn FnOnce() -> io::Result<File> + Send> = if let Some(mut file) = to_append {
            writer.lines = appended;
            Box::new(move || {
                file.write_all(&queued.text)?;
                file.sync_data()?;
                Ok(file)
            })
        } else {
            writer.lines = 0;
            let whole = whole();
            let (path, old) = (path.clone(), old.clone());
            Box::new(move || {
                write_atomically(&path, &whole, 0o600)?;
                let file = OpenOptions::new().append(true).open(&path)?;
                match fs::remove_file(old) {
                    Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
                    Ok(()) | Err(_) => Ok(file),
                }
            })
        };
        let write = move || {
            work().inspect_err(|_| {
                // Best effort: the disk may also be read-only.
                let _ = fs::remove_file(&path);
                let _ = fs::remove_file(&old);
            })
        };
        let written = tokio::task::spawn_blocking(write).await;
        match written.unwrap_or_else(|panicked| Err(io::Error::other(panicked))) {
            Ok(file) => {
                writer.file = Some(file);
                writer.is_failing = false;
            }
            Err(error) => {
                if !writer.is_failing {
                    tracing::error!(%error, file = %self.path.display(), "revocations are in force but could not be written to disk: free space or repair the data directory. After a restart without the database no resume token would be accepted");
                }
                writer.is_failing = true;
            }
        }
    }

    fn queued(&self) -> MutexGuard<'_, Queued> {
        self.queued.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All known revocations, as lines.
pub(super) fn whole(revoked: &Revoked) -> Vec<u8> {
    let mut text = Vec::with_capacity(70 * (revoked.devices().len() + 1));
    append(&mut text, &Line::known(revoked));
    for (device, at) in revoked.devices() {
        append(&mut text, &Line::revoked(device, at));
    }
    text
}

fn append(text: &mut Vec<u8>, line: &Line) {
    // Numbers and ids have a JSON form, and writing to memory does not fail.
    let _ = serde_json::to_writer(&mut *text, line);
    text.push(b'\n');
}

/// A last line without its end was never acknowledged. Any other invalid line is damage.
fn parse(bytes: &[u8]) -> io::Result<Revoked> {
    let end = bytes.iter().rposition(|byte| *byte == b'\n').map_or(0, |last| last + 1);
    let mut revoked: Option<Revoked> = None;
    for line in bytes[..end]
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
    {
        let line: Line = serde_json::from_slice(line).map_err(io::Error::other)?;
        if let (Some(known), Some(floor)) = (line.known, line.floor) {
            let revoked = revoked.get_or_insert_with(|| Revoked::of(Generation(0), Generation(floor), []));
            revoked.raise(Generation(floor));
            revoked.confirm(Generation(known));
        }
        if let (Some(device), Some(at)) = (line.device, line.at) {
            let revoked = revoked
                .as_mut()
                .ok_or_else(|| io::Error::other("its first line is missing"))?;
            revoked.revoke(device, Generation(at));
        }
    }
    revoked.ok_or_else(|| io::Error::other("it has no lines"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(number: u128) -> DeviceId {
        DeviceId::from_uuid(uuid::Uuid::from_u128(number))
    }

    fn known() -> Revoked {
        Revoked::of(Generation(5), Generation(2), [(device(1), Generation(4))])
    }

    fn says(revoked: &Revoked) -> (u32, u32, Vec<(DeviceId, u32)>) {
        let devices = revoked.devices().map(|(device, at)| (device, at.0)).collect();
        (revoked.known().0, revoked.floor().0, devices)
    }

    /// Revokes like [`super::super::Resume::revoke`].
    async fn revoke(journal: &Journal, revoked: &Mutex<Revoked>, number: u128) {
        let at = revoked.lock().unwrap().revoke_now(device(number));
        journal.queue([Line::revoked(device(number), at)]);
        journal.persist(|| whole(&revoked.lock().unwrap())).await;
    }

    #[tokio::test]
    async fn what_was_revoked_is_appended_and_read_back_and_a_torn_line_is_left_out() {
        let home = tempfile::tempdir().unwrap();
        let journal = Journal::new(home.path());
        assert!(journal.read().unwrap().is_none());
        let revoked = Mutex::new(known());
        revoke(&journal, &revoked, 2).await;
        let begun = fs::metadata(journal.path()).unwrap().len();

        revoke(&journal, &revoked, 3).await;
        journal.queue([Line::known(&{
            let mut revoked = revoked.lock().unwrap();
            revoked.confirm(Generation(9));
            revoked.clone()
        })]);
        journal
            .persist(|| unreachable!("few lines are appended, not the whole file written"))
            .await;

        let kept = fs::read(journal.path()).unwrap();
        assert!((1..300).contains(&(kept.len() as u64 - begun)));
        let expected = says(&revoked.lock().unwrap());
        assert_eq!(expected.2.len(), 3);
        assert_eq!(says(&Journal::new(home.path()).read().unwrap().unwrap()), expected);
        fs::write(journal.path(), [&kept[..], b"{\"device\":\"0000"].concat()).unwrap();
        assert_eq!(says(&journal.read().unwrap().unwrap()), expected);
    }

    #[tokio::test]
    async fn journal_that_has_grown_is_written_anew() {
        let home = tempfile::tempdir().unwrap();
        let journal = Journal::new(home.path());
        let revoked = Mutex::new(known());
        revoke(&journal, &revoked, 2).await;

        for _ in 0..3 {
            let at = revoked.lock().unwrap().revoke_now(device(2));
            journal.queue(std::iter::repeat_with(|| Line::revoked(device(2), at)).take(LINES_MAX / 2 + 1));
            journal.persist(|| whole(&revoked.lock().unwrap())).await;
        }

        let kept = fs::read(journal.path()).unwrap();
        assert!(kept.len() < LINES_MAX * 70, "{}", kept.len());
        let expected = says(&revoked.lock().unwrap());
        assert_eq!(says(&journal.read().unwrap().unwrap()), expected);
    }

    #[tokio::test]
    async fn file_of_an_earlier_version_is_read_and_replaced() {
        let home = tempfile::tempdir().unwrap();
        let old = format!(
            "{{\"known\":5,\"floor\":2,\"devices\":[[\"{}\",4]]}}",
            device(1).as_uuid()
        );
        fs::write(home.path().join(OLD_FILE), old).unwrap();
        let journal = Journal::new(home.path());

        let read = journal.read().unwrap().unwrap();
        journal.persist(|| whole(&read)).await;

        assert_eq!(says(&read), says(&known()));
        assert!(!home.path().join(OLD_FILE).exists());
        assert_eq!(says(&journal.read().unwrap().unwrap()), says(&known()));
    }

    #[tokio::test]
    async fn file_that_an_earlier_version_wrote_after_the_journal_adds_to_it() {
        let home = tempfile::tempdir().unwrap();
        let journal = Journal::new(home.path());
        journal.persist(|| whole(&known())).await;
        let old = format!(
            "{{\"known\":9,\"floor\":3,\"devices\":[[\"{}\",8]]}}",
            device(2).as_uuid()
        );
        fs::write(home.path().join(OLD_FILE), old).unwrap();

        let read = Journal::new(home.path()).read().unwrap().unwrap();

        assert_eq!((read.known(), read.floor()), (Generation(9), Generation(3)));
        assert!(!read.allows(device(1), Generation(3)) && !read.allows(device(2), Generation(7)));
    }

    #[tokio::test]
    async fn journal_that_cannot_be_written_leaves_nothing_older_behind() {
        let home = tempfile::tempdir().unwrap();
        let journal = Journal::new(home.path());
        fs::write(home.path().join(OLD_FILE), "{}").unwrap();
        // Blocks the name of the temporary file.
        fs::create_dir(home.path().join(format!("{FILE}.new"))).unwrap();

        journal.persist(|| whole(&known())).await;

        assert!(!journal.path().exists() && !home.path().join(OLD_FILE).exists());
        fs::remove_dir(home.path().join(format!("{FILE}.new"))).unwrap();
        journal.persist(|| whole(&known())).await;
        assert_eq!(says(&journal.read().unwrap().unwrap()), says(&known()));
    }

    #[test]
    fn damaged_journal_is_never_believed_in_part() {
        for text in [
            "",
            "{",
            "\n",
            "[]\n",
            "{\"device\":\"00000000-0000-0000-0000-000000000001\",\"at\":1}\n",
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
        let mut text = whole(&known());
        text.extend_from_slice(b"garbage\n{\"known\":7,\"floor\":2}\n");
        assert!(parse(&text).is_err());
    }
}
