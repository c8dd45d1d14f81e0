use std::{io::Write, path::PathBuf, process::Stdio, time::Duration};

use firmware_sim::stats::Stats;
use tokio::{
    io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    time::timeout,
};

use crate::{DEADLINE, csv, gateway::Gateway};
use futures_util::StreamExt;

const PROGRAM: &str = env!("CARGO_BIN_EXE_firmware-sim");

struct File(PathBuf);

impl File {
    fn new(name: &str, text: &str) -> Self {
        let path = std::env::temp_dir().join(format!("firmware-sim-{}-{name}.csv", std::process::id()));
        std::fs::File::create(&path)
            .unwrap()
            .write_all(text.as_bytes())
            .unwrap();
        Self(path)
    }
}

impl Drop for File {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

/// Runs to the end; exit code and standard error.
async fn run(arguments: &[&str]) -> (i32, String) {
    let run = Command::new(PROGRAM)
        .args(arguments)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output();
    let output = timeout(DEADLINE, run).await.unwrap().unwrap();
    (output.status.code().unwrap(), String::from_utf8(output.stderr).unwrap())
}

struct Running {
    child: Child,
    stdin: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Running {
    fn start(command: &mut Command) -> Self {
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap();
        Self {
            stdin: child.stdin.take().unwrap(),
            lines: BufReader::new(child.stdout.take().unwrap()).lines(),
            child,
        }
    }

    async fn order(&mut self, line: &str) {
        self.stdin.write_all(line.as_bytes()).await.unwrap();
    }

    async fn until(&mut self, is_so: impl Fn(&Stats) -> bool) -> Stats {
        let find = async {
            loop {
                let line = self.lines.next_line().await.unwrap().expect("more lines");
                let stats: Stats = serde_json::from_str(&line).unwrap();
                if is_so(&stats) {
                    return stats;
                }
            }
        };
        timeout(DEADLINE, find).await.unwrap()
    }

    async fn exit_code(&mut self) -> i32 {
        let exit = async {
            while let Ok(Some(_)) = self.lines.next_line().await {}
            self.child.wait().await.unwrap().code().unwrap()
        };
        timeout(DEADLINE, exit).await.unwrap()
    }
}

async fn gateway() -> Gateway {
    Gateway::start(|_, attempt| async {
        let mut socket = attempt.welcome().await;
        while let Some(Ok(_)) = socket.next().await {}
    })
    .await
}

#[tokio::test]
async fn bad_line_is_told_by_number() {
    let file = File::new("bad-line", &(csv(2) + "non\u{1}sense,secret-of-device-x\n"));

    let (code, error) = run(&["--url", "ws://127.0.0.1:1", "--devices", file.0.to_str().unwrap()]).await;

    assert_eq!(code, 1);
    assert!(
        error.contains("line 4: the id is neither a UUID nor 1 to 64 bytes of printable ASCII"),
        "{error}"
    );
}

#[tokio::test]
async fn wrong_use_is_exit_2_and_a_missing_file_exit_1() {
    let file = File::new("wrong-use", &csv(2));
    let devices = file.0.to_str().unwrap();
    let url = ["--url", "ws://127.0.0.1:1", "--devices"];

    for (more, expected, words) in [
        (["/nowhere/d.csv"].as_slice(), 1, "/nowhere/d.csv"),
        (&[devices, "--firmware-mix", "a=1,b=2"], 2, "add up to 3"),
        (&[devices, "--firmware-mix", "a=10%"], 2, "add up to 10"),
        (&[devices, "--profile", "nice"], 2, "well-behaved"),
        (&[devices, "--nonsense"], 2, "--nonsense"),
        (&[devices, "--offset", "2"], 1, "no devices"),
    ] {
        let (code, error) = run(&[url.as_slice(), more].concat()).await;

        assert_eq!(code, expected, "{error}");
        assert!(error.contains(words), "{error}");
    }
    let (code, error) = run(&["--url", "wss://127.0.0.1:1", "--ca", "/nowhere", "--devices", devices]).await;
    assert_eq!(code, 2, "{error}");
}

#[tokio::test]
async fn unreachable_gateway_is_no_failure() {
    let file = File::new("unreachable", &csv(2));
    let devices = file.0.to_str().unwrap();

    let (code, error) = run(&["--url", "ws://127.0.0.1:1", "--devices", devices, "--seconds", "1"]).await;

    assert_eq!((code, error.as_str()), (0, ""));
}

#[tokio::test]
async fn orders_on_standard_input_steer_the_fleet() {
    let gateway = gateway().await;
    let file = File::new("orders", &csv(10));
    let mut running = Running::start(
        Command::new(PROGRAM)
            .args(["--url", &gateway.url(), "--devices", file.0.to_str().unwrap(), "--json"])
            .args(["--profile", "immediate", "--firmware-mix", "a=50%,b=50%"]),
    );
    running.until(|stats| stats.total().connected == 10).await;

    running.order("drop\n").await;
    running.until(|stats| stats.total().reconnects == 10).await;
    running.order("firmware b=100%\n").await;
    running.until(|stats| stats.versions["b"].connected == 10).await;
    running.order("stop\n").await;

    assert_eq!(running.exit_code().await, 0);
}

#[tokio::test]
async fn big_fleet_is_split_over_processes_that_act_as_one() {
    let gateway = gateway().await;
    let file = File::new("split", &csv(60));
    // Room for 22 sockets beside the 128 files that the program keeps for itself: three processes.
    let script = format!(
        "ulimit -n 150; exec '{PROGRAM}' --url {} --devices '{}' --json --profile immediate --firmware-mix 'a=30,b=30'",
        gateway.url(),
        file.0.display()
    );
    let mut running = Running::start(Command::new("sh").args(["-c", &script]));

    let stats = running.until(|stats| stats.total().connected == 60).await;
    assert_eq!((stats.versions["a"].connected, stats.versions["b"].connected), (30, 30));
    assert_eq!(stats.connect_latency.count(), 60);
    running.order("drop\nfirmware a=50\n").await;
    running
        .until(|stats| stats.versions["a"].connected == 50 && stats.total().reconnects >= 60)
        .await;
    let pid = running.child.id().unwrap().to_string();
    Command::new("kill").args(["-TERM", &pid]).status().await.unwrap();

    assert_eq!(running.exit_code().await, 0);
}

#[tokio::test]
async fn lines_for_people_say_what_happens() {
    let gateway = gateway().await;
    let file = File::new("lines", &csv(3));
    let run = Command::new(PROGRAM)
        .args([
            "--url",
            &gateway.url(),
            "--devices",
            file.0.to_str().unwrap(),
            "--seconds",
            "2",
        ])
        .args(["--firmware-mix", "3.8.0-b2"])
        .stdin(Stdio::null())
        .output();

    let output = timeout(Duration::from_secs(30), run).await.unwrap().unwrap();

    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.lines().last().unwrap().contains("connected 3/3"), "{text}");
    assert!(text.contains("3.8.0-b2 3/3"), "{text}");
}
