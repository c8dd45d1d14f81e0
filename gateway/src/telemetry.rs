//! Logs: lines on standard error, and the level that can be changed while the gateway runs.
//!
//! Lines go through a bounded queue to a thread of their own, so that a reader who stops reading (a full pipe) never stops
//! the gateway: lines over the bound are dropped and counted. Times are RFC 3339 in UTC. Start with [`start`].

use std::{
    io::{self, IsTerminal, Write},
    sync::{
        Mutex, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    thread,
    time::Duration,
};

use tracing_subscriber::{
    EnvFilter, Layer, Registry, filter::ParseError, fmt::MakeWriter, layer::SubscriberExt, reload,
    util::SubscriberInitExt,
};

use crate::config::{LogFormat, Logging};

/// Lines that wait to be written; one more is dropped, and counted by [`dropped_lines`].
const QUEUE_LINES_MAX: usize = 8_192;
/// Time that [`Guard`] gives a slow reader for the last lines.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

static LEVEL: OnceLock<Mutex<Level>> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);

struct Level {
    text: String,
    handle: reload::Handle<EnvFilter, Registry>,
}

/// Installs the log of this process. Panics are log lines, too.
///
/// # Errors
/// The level is neither a level nor directives, or a log is installed already.
pub fn start(logging: &Logging) -> anyhow::Result<Guard> {
    let (filter, handle) = reload::Layer::new(parse_level(&logging.level)?);
    let (writer, guard) = queue();
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_target(true);
    let lines = match logging.format {
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_ansi(false)
            .boxed(),
        LogFormat::Human => lines.compact().with_ansi(io::stderr().is_terminal()).boxed(),
    };
    tracing_subscriber::registry().with(filter).with(lines).try_init()?;
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        tracing::error!(
            place,
            message = panic.payload_as_str().unwrap_or_default(),
            "a task panicked: this is a bug, please report it"
        );
    }));
    LEVEL.get_or_init(|| {
        Mutex::new(Level {
            text: logging.level.clone(),
            handle,
        })
    });
    Ok(guard)
}

/// Reads a level, or directives such as `info,seawall_gateway::lookup=debug`.
///
/// # Errors
/// The text is neither.
pub fn parse_level(text: &str) -> Result<EnvFilter, ParseError> {
    EnvFilter::builder().parse(text)
}

/// Changes what is logged from now on, in the whole process.
///
/// # Errors
/// The text is neither a level nor directives; nothing has changed then.
pub fn set_level(text: &str) -> Result<(), ParseError> {
    let filter = parse_level(text)?;
    if let Some(level) = LEVEL.get() {
        let mut level = level.lock().unwrap_or_else(PoisonError::into_inner);
        // The layer lives as long as the process, so that a reload reaches it.
        if level.handle.reload(filter).is_ok() {
            text.clone_into(&mut level.text);
        }
    }
    Ok(())
}

/// What is logged now; `None` where this process has no log of ours.
#[must_use]
pub fn level() -> Option<String> {
    LEVEL
        .get()
        .map(|level| level.lock().unwrap_or_else(PoisonError::into_inner).text.clone())
}

/// Log lines dropped since the start because the reader of standard error was too slow.
#[must_use]
pub fn dropped_lines() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Writes the last lines when it is dropped, for at most a second.
pub struct Guard {
    stop: SyncSender<Box<[u8]>>,
    stopped: Receiver<()>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // An empty line means the end. A full queue means that nobody reads: there is nothing to wait for.
        if self.stop.try_send(Box::default()).is_ok() {
            let (Ok(()) | Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected)) =
                self.stopped.recv_timeout(FLUSH_TIMEOUT);
        }
    }
}

fn queue() -> (QueueWriter, Guard) {
    let (lines, waiting) = sync_channel(QUEUE_LINES_MAX);
    let (ended, stopped) = sync_channel(1);
    let guard = Guard {
        stop: lines.clone(),
        stopped,
    };
    // Without the thread every line would be dropped: then the process is out of threads, and the start fails soon enough.
    let _ = thread::Builder::new().name("log".into()).spawn(move || {
        write_lines(&waiting);
        let _ = ended.try_send(());
    });
    (QueueWriter(lines), guard)
}

fn write_lines(waiting: &Receiver<Box<[u8]>>) {
    let mut dropped_before = 0;
    while let Ok(line) = waiting.recv() {
        if line.is_empty() {
            return;
        }
        // Nobody is left to tell of a failure to log.
        let _ = io::stderr().write_all(&line);
        let dropped = dropped_lines();
        if dropped > dropped_before {
            let _ = writeln!(
                io::stderr(),
                "{} log lines dropped: standard error is read too slowly",
                dropped - dropped_before
            );
            dropped_before = dropped;
        }
    }
}

#[derive(Clone)]
struct QueueWriter(SyncSender<Box<[u8]>>);

impl MakeWriter<'_> for QueueWriter {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// Gets one whole line a call.
impl Write for QueueWriter {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if !line.is_empty() && self.0.try_send(line.into()).is_err() {
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn level_takes_names_and_directives_and_refuses_others() {
        for text in ["info", "WARN", "info,seawall_gateway::lookup=debug", "off"] {
            assert!(parse_level(text).is_ok(), "{text}");
        }
        for text in ["seawall=loud", "info,=,", "a=b=c"] {
            assert!(parse_level(text).is_err(), "{text}");
        }
    }

    #[test]
    fn line_over_the_bound_is_dropped_and_counted() {
        let (lines, _waiting) = sync_channel(1);
        let mut writer = QueueWriter(lines);
        let before = dropped_lines();

        writer.write_all(b"first\n").unwrap();
        writer.write_all(b"second\n").unwrap();

        assert_eq!(dropped_lines() - before, 1);
    }
}
