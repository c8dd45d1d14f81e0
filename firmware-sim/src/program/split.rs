//! A fleet too big for one process: parts of it in children of this program, steered by their standard input, their
//! figures read from their standard output.
//!
//! A child ends when its standard input does: none outlives its parent, however that ends.

use std::{
    env,
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Error, bail, ensure};
use firmware_sim::stats::Stats;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader},
    process::{Child, ChildStdin, ChildStdout, Command},
    task::JoinHandle,
    time::timeout,
};

use super::orders::Order;

/// Children at most: a million devices in processes of 18,000, with room to spare.
const PARTS_MAX: usize = 64;

/// A child has this long to say goodbye for its devices.
const STOP_MAX: Duration = Duration::from_secs(15);

pub struct Split {
    parts: Vec<Part>,
}

struct Part {
    child: Child,
    stdin: ChildStdin,
    /// The last figures it wrote.
    stats: Arc<Mutex<Stats>>,
    reader: JoinHandle<()>,
}

impl Split {
    /// Starts a child for each `per_process` devices.
    pub fn start(devices: usize, per_process: usize) -> Result<Self, Error> {
        let count = devices.div_ceil(per_process);
        ensure!(
            count <= PARTS_MAX,
            "{devices} devices take {count} processes of {per_process}: at most {PARTS_MAX} are started (see `ulimit -n`)"
        );
        // Parts of about one size, so that none is the last to be done.
        let bounds = (0..=count).map(|part| devices * part / count).collect::<Vec<_>>();
        let parts = bounds
            .windows(2)
            .filter_map(|pair| Some((*pair.first()?, *pair.last()?)))
            .map(|(first, end)| Part::start(first, end))
            .collect::<Result<_, _>>()?;
        Ok(Self { parts })
    }

    /// All parts together.
    pub fn stats(&self) -> Stats {
        let mut whole = Stats::default();
        for part in &self.parts {
            whole.merge(&part.stats.lock().unwrap_or_else(PoisonError::into_inner));
        }
        whole
    }

    /// Fails if a part has ended on its own.
    pub fn check(&mut self) -> Result<(), Error> {
        for part in &mut self.parts {
            if let Some(status) = part.child.try_wait().context("looking after a part of the fleet")? {
                bail!("a part of the fleet has ended on its own: {status}");
            }
        }
        Ok(())
    }

    pub async fn pass_on(&mut self, order: &Order) -> Result<(), Error> {
        if let Order::Unknown(line) = order {
            return Err(super::orders::unknown(line));
        }
        for part in &mut self.parts {
            let line = format!("{order}\n");
            part.stdin
                .write_all(line.as_bytes())
                .await
                .context("steering a part of the fleet")?;
        }
        Ok(())
    }

    /// Ends all parts, and returns their last figures.
    pub async fn stop(self) -> Result<Stats, Error> {
        let mut whole = Stats::default();
        let (mut ending, mut failed) = (Vec::new(), None);
        for part in self.parts {
            // Its end is the order.
            drop(part.stdin);
            ending.push((part.child, part.reader, part.stats));
        }
        for (mut child, reader, stats) in ending {
            match timeout(STOP_MAX, child.wait()).await {
                Ok(Ok(status)) if status.success() => {}
                Ok(Ok(status)) => failed = Some(format!("a part of the fleet failed: {status}")),
                Ok(Err(_)) | Err(_) => failed = Some("a part of the fleet did not end, and was killed".to_owned()),
            }
            let _ = timeout(STOP_MAX, reader).await;
            whole.merge(&stats.lock().unwrap_or_else(PoisonError::into_inner));
        }
        match failed {
            None => Ok(whole),
            Some(failed) => bail!(failed),
        }
    }
}

impl Part {
    fn start(first: usize, end: usize) -> Result<Self, Error> {
        let program = env::current_exe().context("looking for this program's own file")?;
        let mut child = Command::new(program)
            .args(env::args_os().skip(1))
            .args(["--json", "--part", &format!("{first}..{end}")])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("starting a part of the fleet")?;
        let stdin = child.stdin.take().context("a pipe to a part of the fleet")?;
        let stdout = child.stdout.take().context("a pipe from a part of the fleet")?;
        let stats = Arc::default();
        let reader = tokio::spawn(read(stdout, Arc::clone(&stats)));
        Ok(Self {
            child,
            stdin,
            stats,
            reader,
        })
    }
}

/// Keeps the last line that a child wrote. Ends with the child.
async fn read(stdout: ChildStdout, stats: Arc<Mutex<Stats>>) {
    let mut lines = BufReader::new(stdout).lines();
    while let Ok(Some(line)) = lines.next_line().await {
        if let Ok(latest) = serde_json::from_str(&line) {
            *stats.lock().unwrap_or_else(PoisonError::into_inner) = latest;
        }
    }
}
