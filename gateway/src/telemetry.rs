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
    time::{Duration, SystemTime},
};

use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    filter::{LevelFilter, ParseError},
    fmt::MakeWriter,
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};

use crate::config::{LogFormat, Logging};

/// Lines that wait to be written; one more is dropped, and counted by [`dropped_lines`].
const QUEUE_LINES_MAX: usize = 8_192;
/// Longest text of a level, in bytes; a longer one is refused.
const LEVEL_BYTES_MAX: usize = 1_024;
/// Time that [`Guard`] gives a slow reader for the last lines.
const FLUSH_TIMEOUT: Duration = Duration::from_secs(1);

static LEVEL: OnceLock<Mutex<Level>> = OnceLock::new();
static DROPPED: AtomicU64 = AtomicU64::new(0);

struct Level {
    text: String,
    handle: reload::Handle<EnvFilter, Registry>,
}

/// A text that says nothing of what to log.
#[derive(Debug, thiserror::Error)]
pub enum InvalidLevel {
    /// As in `hyper`, which the syntax of directives would take for a target.
    #[error("{0:?} is no level: expected off, error, warn, info, debug, trace, or TARGET=LEVEL")]
    Unknown(String),
    /// There is neither a level nor a directive in it.
    #[error("is empty: expected a level, or directives such as info,seawall_gateway::lookup=debug")]
    Empty,
    /// Over the bound.
    #[error("is longer than {LEVEL_BYTES_MAX} bytes")]
    TooLong,
    /// A directive that can't be read.
    #[error(transparent)]
    Directive(#[from] ParseError),
}

/// Why what is logged did not change.
#[derive(Debug, thiserror::Error)]
pub enum LevelError {
    #[error(transparent)]
    Invalid(#[from] InvalidLevel),
    /// The gateway is a part of a process that logs in its own way.
    #[error("this process has no log of the gateway's")]
    NoLog,
}

/// What was logged before a change, and what is since; the same where there was nothing to change.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LevelChange {
    pub from: String,
    pub to: String,
}

impl LevelChange {
    /// Whether anything changed.
    #[must_use]
    pub fn is_change(&self) -> bool {
        self.from != self.to
    }
}

/// Form of log lines, with what `auto` came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lines {
    Json,
    Human,
}

impl Lines {
    fn of(format: LogFormat) -> Self {
        match format {
            LogFormat::Human => Self::Human,
            LogFormat::Auto if io::stderr().is_terminal() => Self::Human,
            LogFormat::Json | LogFormat::Auto => Self::Json,
        }
    }
}

/// Installs the log of this process. A panic is a log line as well. `node` is in each JSON line, so that lines of several nodes
/// can be told apart.
///
/// # Errors
/// The level is neither a level nor directives, or a log is installed already.
pub fn start(logging: &Logging, node: &str) -> anyhow::Result<Guard> {
    let (filter, handle) = reload::Layer::new(parse_level(&logging.level)?);
    let format = Lines::of(logging.format);
    let (writer, guard) = queue(format, node);
    tracing_subscriber::registry()
        .with(filter)
        .with(layer(format, writer))
        .try_init()?;
    std::panic::set_hook(Box::new(|panic| {
        let place = panic.location().map(ToString::to_string).unwrap_or_default();
        log_panic(&place, panic.payload_as_str().unwrap_or_default());
    }));
    LEVEL.get_or_init(|| {
        Mutex::new(Level {
            text: logging.level.clone(),
            handle,
        })
    });
    Ok(guard)
}

/// How an event becomes a line. A field of an event that is called as one of a line's own (`timestamp`, `level`, `target`, `message`)
/// would stand in the line twice: no event may have one.
fn layer<S>(format: Lines, writer: QueueWriter) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    let lines = tracing_subscriber::fmt::layer().with_writer(writer).with_target(true);
    match format {
        Lines::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_ansi(false)
            .boxed(),
        Lines::Human => lines.compact().with_ansi(io::stderr().is_terminal()).boxed(),
    }
}

fn log_panic(place: &str, panic: &str) {
    tracing::error!(place, panic, "a task panicked: this is a bug, please report it");
}

/// Reads a level, or directives such as `info,seawall_gateway::lookup=debug`.
///
/// # Errors
/// The text is neither.
pub fn parse_level(text: &str) -> Result<EnvFilter, InvalidLevel> {
    if text.len() > LEVEL_BYTES_MAX {
        return Err(InvalidLevel::TooLong);
    }
    let mut directives = text.split(',').filter(|directive| !directive.is_empty()).peekable();
    if directives.peek().is_none() {
        return Err(InvalidLevel::Empty);
    }
    // A level written wrongly would count as a target, and nothing but that target would be logged.
    let unknown =
        directives.find(|directive| !directive.contains(['=', '[']) && directive.parse::<LevelFilter>().is_err());
    match unknown {
        Some(unknown) => Err(InvalidLevel::Unknown(unknown.to_owned())),
        None => Ok(EnvFilter::builder().parse(text)?),
    }
}

/// Changes what is logged from now on, in the whole process. A change is an INFO line, if INFO is logged before it or after it.
///
/// # Errors
/// The text is neither a level nor directives, or there is no log to change; nothing has changed then.
pub fn set_level(text: &str) -> Result<LevelChange, LevelError> {
    let filter = parse_level(text)?;
    let mut level = LEVEL
        .get()
        .ok_or(LevelError::NoLog)?
        .lock()
        .unwrap_or_else(PoisonError::into_inner);
    let change = LevelChange {
        from: level.text.clone(),
        to: text.to_owned(),
    };
    if change.is_change() {
        let tell = || tracing::info!(from = change.from, to = change.to, "log level changed");
        let is_heard = tracing::enabled!(tracing::Level::INFO);
        if is_heard {
            tell();
        }
        // The layer lives as long as the process, so that a reload reaches it.
        level.handle.reload(filter).map_err(|_| LevelError::NoLog)?;
        text.clone_into(&mut level.text);
        if !is_heard {
            tell();
        }
    }
    Ok(change)
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
    format: Lines,
    stop: SyncSender<Box<[u8]>>,
    stopped: Receiver<()>,
}

impl Guard {
    /// Whether lines are JSON.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.format == Lines::Json
    }
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

fn queue(format: Lines, node: &str) -> (QueueWriter, Guard) {
    let prefix = match format {
        Lines::Json => format!("{{\"node.id\":{},", serde_json::Value::from(node)).into_bytes(),
        Lines::Human => Vec::new(),
    };
    let (lines, waiting) = sync_channel(QUEUE_LINES_MAX);
    let (ended, stopped) = sync_channel(1);
    let guard = Guard {
        format,
        stop: lines.clone(),
        stopped,
    };
    // Without the thread every line would be dropped: then the process is out of threads, and the start fails soon enough.
    let _ = thread::Builder::new().name("log".into()).spawn(move || {
        write_lines(&waiting, format, &prefix);
        let _ = ended.try_send(());
    });
    (QueueWriter(lines), guard)
}

/// `prefix` takes the place of the brace that a JSON line begins with.
fn write_lines(waiting: &Receiver<Box<[u8]>>, format: Lines, prefix: &[u8]) {
    let mut whole = Vec::new();
    let mut dropped_before = 0;
    while let Ok(line) = waiting.recv() {
        if line.is_empty() {
            return;
        }
        whole.clear();
        with_prefix(&line, prefix, &mut whole);
        // Nobody is left to tell of a failure to log.
        let _ = io::stderr().write_all(&whole);
        let dropped = dropped_lines();
        if dropped > dropped_before {
            whole.clear();
            let line = line_of_dropped(dropped - dropped_before, format) + "\n";
            with_prefix(line.as_bytes(), prefix, &mut whole);
            let _ = io::stderr().write_all(&whole);
            dropped_before = dropped;
        }
    }
}

fn with_prefix(line: &[u8], prefix: &[u8], whole: &mut Vec<u8>) {
    match line.strip_prefix(b"{") {
        Some(rest) if !prefix.is_empty() => {
            whole.extend_from_slice(prefix);
            whole.extend_from_slice(rest);
        }
        Some(_) | None => whole.extend_from_slice(line),
    }
}

/// Not an event: it would have to pass the full queue.
fn line_of_dropped(lines: u64, format: Lines) -> String {
    const MESSAGE: &str = "log lines dropped: standard error is read too slowly";
    match format {
        Lines::Json => serde_json::json!({
            "timestamp": humantime::format_rfc3339_micros(SystemTime::now()).to_string(),
            "level": "WARN",
            "message": MESSAGE,
            "lines": lines,
            "target": module_path!(),
        })
        .to_string(),
        Lines::Human => format!("{lines} {MESSAGE}"),
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
        for text in [
            "info",
            "WARN",
            "info,seawall_gateway::lookup=debug",
            "off",
            "info,[db.audit.page]=trace",
        ] {
            assert!(parse_level(text).is_ok(), "{text}");
        }
        for text in [
            "seawall=loud",
            "info,=,",
            "a=b=c",
            "loud",
            "info,hyper",
            " debug",
            "",
            ",",
            &"x".repeat(2_000),
        ] {
            assert!(parse_level(text).is_err(), "{text}");
        }
    }

    #[test]
    fn line_of_a_panic_has_each_key_once() {
        let (lines, waiting) = sync_channel(1);
        let log = tracing_subscriber::registry().with(layer(Lines::Json, QueueWriter(lines)));

        tracing::subscriber::with_default(log, || log_panic("src/door.rs:1:1", "out of luck"));

        let line = String::from_utf8(waiting.recv().unwrap().into()).unwrap();
        let json: serde_json::Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            (&json["panic"], &json["place"]),
            (&"out of luck".into(), &"src/door.rs:1:1".into())
        );
        assert_eq!(line.matches("\"message\":").count(), 1, "{line}");
    }

    #[test]
    fn line_of_what_was_dropped_has_the_form_of_the_others() {
        let json: serde_json::Value = serde_json::from_str(&line_of_dropped(7, Lines::Json)).unwrap();

        assert_eq!((&json["level"], &json["lines"]), (&"WARN".into(), &7.into()));
        assert!(json["timestamp"].as_str().unwrap().ends_with('Z'), "{json}");
        assert!(line_of_dropped(7, Lines::Human).starts_with("7 log lines dropped"));
    }

    #[test]
    fn each_json_line_names_the_node() {
        let (mut whole, prefix) = (Vec::new(), b"{\"node.id\":\"gw \\\"7\\\"\",".as_slice());

        with_prefix(b"{\"level\":\"INFO\"}\n", prefix, &mut whole);

        let json: serde_json::Value = serde_json::from_slice(&whole).unwrap();
        assert_eq!((&json["node.id"], &json["level"]), (&"gw \"7\"".into(), &"INFO".into()));
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
