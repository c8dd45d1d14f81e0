//! Logs: lines on standard error, with a level that can be changed at run time.
//!
//! Lines go through a bounded queue to a separate thread, so that a reader that stops reading (a full pipe) never stops
//! the gateway. Lines beyond the bound are dropped and counted. Times are RFC 3339 in UTC. Start with [`start`].

use std::{
    io::{self, IsTerminal, Write},
    sync::{Mutex, OnceLock, PoisonError, mpsc},
    time::{Duration, SystemTime},
};

use tracing_appender::non_blocking::{ErrorCounter, NonBlocking, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    EnvFilter, Layer, Registry, fmt::MakeWriter, layer::SubscriberExt, registry::LookupSpan, reload,
    util::SubscriberInitExt,
};

use crate::runtime::config::{InvalidLevel, LogFormat, Logging, parse_level};

/// Maximum number of lines that wait to be written. Further ones are dropped, and counted by [`dropped_lines`].
const QUEUE_LINES_MAX: usize = 8_192;
/// Maximum time that dropping [`Guard`] takes. The worker needs at most 1.1 s to write what it can.
const FLUSH_TIMEOUT: Duration = Duration::from_millis(1_200);

static LEVEL: OnceLock<Mutex<Level>> = OnceLock::new();
static DROPPED: OnceLock<ErrorCounter> = OnceLock::new();

struct Level {
    text: String,
    handle: reload::Handle<EnvFilter, Registry>,
}

/// Why the log level was not changed.
#[derive(Debug, thiserror::Error)]
pub enum LevelError {
    #[error(transparent)]
    Invalid(#[from] InvalidLevel),
    /// The gateway is part of a process with its own log.
    #[error("this process has no log of the gateway's")]
    NoLog,
}

/// Log level before and after a change. Both are equal if nothing changed.
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

/// Format of log lines, with `auto` resolved.
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

/// Installs the log of this process. A panic is also logged. `node` is in each JSON line, so that lines of several
/// nodes can be told apart.
///
/// # Errors
/// The level is neither a level nor directives, or a log is already installed.
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

/// Formats events as lines. An event must have no field called `timestamp`, `level`, `target` or `message`, since the
/// line would contain it twice.
fn layer<S, W>(format: Lines, writer: W) -> Box<dyn Layer<S> + Send + Sync>
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
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

/// Changes the log level of the whole process. A change is logged at INFO, if INFO is logged before or after it.
///
/// # Errors
/// The text is neither a level nor directives, or there is no log to change. Nothing has changed then.
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
        // The layer lives as long as the process, so a reload always reaches it.
        level.handle.reload(filter).map_err(|_| LevelError::NoLog)?;
        text.clone_into(&mut level.text);
        if !is_heard {
            tell();
        }
    }
    Ok(change)
}

/// The current log level; `None` if this process has no log of the gateway.
#[must_use]
pub fn level() -> Option<String> {
    LEVEL
        .get()
        .map(|level| level.lock().unwrap_or_else(PoisonError::into_inner).text.clone())
}

/// Number of log lines dropped since the start because standard error was read too slowly.
#[must_use]
pub fn dropped_lines() -> u64 {
    DROPPED.get().map_or(0, |counter| counter.dropped_lines() as u64)
}

/// Writes the last lines when dropped, for at most [`FLUSH_TIMEOUT`].
pub struct Guard {
    format: Lines,
    worker: Option<WorkerGuard>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let worker = self.worker.take();
        let (sender, ended) = mpsc::channel::<()>();
        // On a separate thread: if the queue is stuck, it prints to standard output, which may also block.
        let end = move || {
            drop(worker);
            drop(sender);
        };
        if std::thread::Builder::new().name("log end".into()).spawn(end).is_ok() {
            let _ = ended.recv_timeout(FLUSH_TIMEOUT);
        }
    }
}

impl Guard {
    /// Whether lines are JSON.
    #[must_use]
    pub fn is_json(&self) -> bool {
        self.format == Lines::Json
    }
}

fn queue(format: Lines, node: &str) -> (NonBlocking, Guard) {
    let prefix = match format {
        Lines::Json => format!("{{\"node.id\":{},", serde_json::Value::from(node)).into_bytes(),
        Lines::Human => Vec::new(),
    };
    let stderr = Stderr {
        format,
        prefix,
        whole: Vec::new(),
        reported: 0,
    };
    let (writer, worker) = NonBlockingBuilder::default()
        .buffered_lines_limit(QUEUE_LINES_MAX)
        .thread_name("log")
        .finish(stderr);
    DROPPED.get_or_init(|| writer.error_counter());
    let guard = Guard {
        format,
        worker: Some(worker),
    };
    (writer, guard)
}

/// Standard error. Each JSON line begins with the node, and dropped lines are reported.
struct Stderr {
    format: Lines,
    /// Replaces the brace at the start of a JSON line.
    prefix: Vec<u8>,
    whole: Vec<u8>,
    /// Number of dropped lines that were reported.
    reported: u64,
}

impl Stderr {
    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        self.whole.clear();
        with_prefix(line, &self.prefix, &mut self.whole);
        io::stderr().write_all(&self.whole)
    }
}

/// Each call gets one whole line.
impl Write for Stderr {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.write_line(line)?;
        let dropped = dropped_lines();
        if dropped > self.reported {
            let line = line_of_dropped(dropped - self.reported, self.format) + "\n";
            self.reported = dropped;
            self.write_line(line.as_bytes())?;
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
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

/// Written directly: an event would have to pass the full queue.
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, mpsc};

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
        let file = tempfile::NamedTempFile::new().unwrap();
        let log = tracing_subscriber::registry().with(layer(Lines::Json, Arc::new(file.reopen().unwrap())));

        tracing::subscriber::with_default(log, || log_panic("src/door.rs:1:1", "out of luck"));

        let line = std::fs::read_to_string(file.path()).unwrap();
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

    /// Reports each line, and blocks until the test continues it.
    struct Blocked {
        lines: mpsc::Sender<Vec<u8>>,
        let_go: mpsc::Receiver<()>,
    }

    impl Write for Blocked {
        fn write(&mut self, line: &[u8]) -> io::Result<usize> {
            let _ = self.lines.send(line.to_vec());
            let _ = self.let_go.recv();
            Ok(line.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn line_over_the_bound_is_dropped_and_counted() {
        let (lines, written) = mpsc::channel();
        let (hold, let_go) = mpsc::channel();
        let (mut writer, worker) = NonBlockingBuilder::default()
            .lossy(true)
            .buffered_lines_limit(1)
            .finish(Blocked { lines, let_go });
        let dropped = writer.error_counter();

        writer.write_all(b"held\n").unwrap();
        assert_eq!(written.recv().unwrap(), b"held\n");
        writer.write_all(b"queued\n").unwrap();
        assert_eq!(dropped.dropped_lines(), 0);
        writer.write_all(b"over the bound\n").unwrap();

        assert_eq!(dropped.dropped_lines(), 1);
        drop(hold);
        drop((writer, worker));
        assert_eq!(written.iter().collect::<Vec<_>>(), [b"queued\n"]);
    }
}
