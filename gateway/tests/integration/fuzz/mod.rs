//! Content of files and sockets: nothing panics, accepted input survives a round trip, and nothing takes long.
//!
//! The tests of `seawall_proto` do the same for its own parsers. `PROPTEST_CASES` sets the number of inputs.

#[path = "../../../../proto/tests/fuzz/mutate.rs"]
mod mutate;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use proptest::{prelude::*, test_runner::TestRunner};
use seawall_gateway::{
    edge::{head::HeadReader, proxy, transport::Transport},
    fleet::{last_known_good, resume::Resume, rules::Rules},
    runtime::{config::Config, keys},
    session::socket::{Inbound, Socket, SocketLimits},
    tokens::Tokens,
};
use seawall_proto::{firmware::Range, refusal::Refusal, resume::ResumeKeys, rules::Subject, time::WallTime};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    time::timeout,
};

use self::mutate::{inputs, settings};

/// Maximum time of a single input, on a machine with other load.
const TIME_MAX: Duration = Duration::from_secs(2);

fn folder(kind: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/integration/fuzz/corpus")
        .join(kind)
}

fn try_all(kind: &str, check: impl Fn(&[u8]) -> Result<(), TestCaseError>) {
    let settings = settings(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/integration/fuzz/failures.txt"
    ));
    let tried = TestRunner::new(settings).run(&inputs(&folder(kind)), |input| {
        let begun = Instant::now();
        check(&input)?;
        prop_assert!(begun.elapsed() < TIME_MAX, "{:?}", begun.elapsed());
        Ok(())
    });
    if let Err(failure) = tried {
        panic!("{failure}");
    }
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// Both ends of a connection. The client has sent these bytes, and nothing follows.
async fn sent(bytes: &[u8]) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut client = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
    let (server, _) = listener.accept().await.unwrap();
    // Less than the kernel buffers for a peer that does not read yet.
    client.write_all(bytes).await.unwrap();
    client.shutdown().await.unwrap();
    (client, server)
}

#[test]
fn configurations() {
    try_all("config", |input| {
        let Ok(config) = Config::from_toml(&String::from_utf8_lossy(input)) else {
            return Ok(());
        };
        let is_valid = config.validate().is_ok();
        if config.database.url.is_none() {
            let said = toml::to_string(&config).unwrap();
            let again = Config::from_toml(&said);
            prop_assert_eq!(again.as_ref(), Ok(&config), "{}", said);
            prop_assert_eq!(again.is_ok_and(|again| again.validate().is_ok()), is_valid);
        }
        Ok(())
    });
}

#[test]
fn heads_off_a_socket() {
    let runtime = runtime();
    try_all("head", |input| {
        runtime.block_on(async {
            let (_client, server) = sent(input).await;
            let (mut stream, mut reader) = (Transport::from(server), HeadReader::new(8 * 1024));
            let read = reader.read(&mut stream, |head| (head.target.to_owned(), head.headers.len()));
            let read = timeout(TIME_MAX, read).await;
            prop_assert!(read.is_ok());
            if let Ok(Ok(complete)) = read {
                prop_assert!(complete.parsed.0.len() <= 8 * 1024 && complete.parsed.1 <= 8 * 1024 / 3);
                prop_assert!(
                    input
                        .windows(complete.leftover.len().max(1))
                        .any(|part| part == complete.leftover)
                        || complete.leftover.is_empty()
                );
            }
            Ok(())
        })
    });
}

#[test]
fn frames_off_a_socket() {
    const LEN_MAX: usize = 1_000;
    let runtime = runtime();
    try_all("frames", |input| {
        runtime.block_on(async {
            let (mut client, server) = sent(input).await;
            let limits = SocketLimits {
                frame_len_max: LEN_MAX,
                message_len_max: LEN_MAX,
                write_timeout: TIME_MAX,
                message_time_max: TIME_MAX,
            };
            let mut socket = Socket::new(server.into(), &[], Arc::new(limits));
            let reading = async {
                let mut len = 0;
                loop {
                    match socket.next().await {
                        Inbound::Text(text) => len = text.len().max(len),
                        Inbound::Binary(bytes) => len = bytes.len().max(len),
                        Inbound::Control => {}
                        Inbound::Goodbye(_) | Inbound::BadGoodbye => {
                            socket.finish().await;
                            return len;
                        }
                        Inbound::Broken(close) => {
                            socket.fail(&close).await;
                            return len;
                        }
                        Inbound::Gone => return len,
                    }
                }
            };
            let longest = timeout(TIME_MAX, reading).await;
            prop_assert!(longest.is_ok_and(|longest| longest <= LEN_MAX));
            // The answer is a few pongs and a close.
            let mut answer = Vec::new();
            let _ = client.read_to_end(&mut answer).await;
            prop_assert!(answer.len() <= input.len() + 200);
            Ok(())
        })
    });
}

#[test]
fn proxy_headers() {
    const HEADER_LEN_MAX: usize = 4 * 1024;
    let runtime = runtime();
    try_all("proxy", |input| {
        runtime.block_on(async {
            let (_client, mut server) = sent(input).await;
            let read = timeout(TIME_MAX, proxy::read_header(&server)).await;
            let Ok(Ok(origin)) = read else {
                prop_assert!(read.is_ok());
                return Ok(());
            };
            let mut rest = Vec::new();
            server.read_to_end(&mut rest).await.unwrap();
            prop_assert!(input.ends_with(&rest) && rest.len() < input.len());
            let header = &input[..input.len() - rest.len()];
            prop_assert!(header.len() <= HEADER_LEN_MAX);
            if let (Some(origin), Ok(line)) = (origin, std::str::from_utf8(header))
                && line.starts_with("PROXY ")
            {
                let named: Option<std::net::IpAddr> = line.split(' ').nth(2).and_then(|address| address.parse().ok());
                prop_assert_eq!(named, Some(origin.ip()));
            }
            Ok(())
        })
    });
}

/// Writes each input to the place where a gateway reads it, and passes the directory.
fn try_files(kind: &str, name: &str, check: impl Fn(&Path) -> Result<(), TestCaseError>) {
    let home = tempfile::tempdir().unwrap();
    try_all(kind, |input| {
        fs::write(home.path().join(name), input).unwrap();
        check(home.path())
    });
}

#[test]
fn files_of_revocations() {
    for (kind, name) in [("revoked", "revoked.json"), ("revoked_lines", "revoked.jsonl")] {
        try_files(kind, name, |home| {
            let resume = Resume::open(home, ResumeKeys::new(1, [7; 32]), Duration::from_secs(60));
            let _ = (resume.known(), resume.revision(), resume.revoked_len());
            Ok(())
        });
    }
}

#[test]
fn what_the_corpus_holds_is_taken() {
    let home = tempfile::tempdir().unwrap();
    for kind in ["rules", "revoked", "known_good", "tokens", "keys"] {
        for (number, file) in mutate::corpus(&folder(kind)).into_iter().enumerate() {
            let name = kind.replace("known_good", "known-good");
            fs::write(home.path().join(format!("{name}.json")), file).unwrap();
            let resume = Resume::open(home.path(), ResumeKeys::new(1, [7; 32]), Duration::from_secs(60));
            let is_taken = match kind {
                "rules" => {
                    let set = Rules::open(home.path()).current();
                    !set.rules().is_empty() || !set.unsupported().is_empty()
                }
                "revoked" => resume.revision().is_some(),
                "known_good" => last_known_good::load(home.path()).is_some(),
                "tokens" => !Tokens::open(home.path()).unwrap().is_empty(),
                _ => keys::open(home.path()).is_ok(),
            };
            assert!(is_taken, "{kind} {number}");
        }
    }
    for file in mutate::corpus(&folder("config")) {
        Config::from_toml(&String::from_utf8(file).unwrap())
            .unwrap()
            .validate()
            .unwrap();
    }
}

#[test]
fn files_of_rules() {
    try_files("rules", "rules.json", |home| {
        let set = Rules::open(home).current();
        for rule in set.rules() {
            let spec = &rule.spec;
            let firmware = spec.matches.firmware.as_ref().map(Range::as_str);
            let subject = Subject {
                device: None,
                firmware: firmware.or(Some("3.8.0")),
                model: Some("m"),
                tenant: Some("t"),
            };
            let _ = set.verdict(&subject, WallTime::from_unix_ms(1_800_000_000_000));
            let refusal = Refusal::firmware_blocked(rule.id, &spec.reason, spec.retry_after, &mut rand::rng());
            let mut answer = Vec::new();
            refusal.write_response(&mut answer);
            prop_assert!(answer.len() < 4 * 1024, "{} bytes", answer.len());
        }
        Ok(())
    });
}

#[test]
fn files_of_capacity_and_keys_and_tokens() {
    try_files("known_good", last_known_good::FILE, |home| {
        prop_assert!(last_known_good::load(home).is_none_or(|rate| rate > 0.0 && rate.is_finite()));
        Ok(())
    });
    try_files("keys", "keys.json", |home| {
        let before = fs::read(home.join("keys.json")).unwrap();
        let _ = keys::open(home);
        prop_assert_eq!(
            fs::read(home.join("keys.json")).unwrap(),
            before,
            "a damaged file is never overwritten"
        );
        Ok(())
    });
    try_files("tokens", "tokens.json", |home| {
        let tokens = Tokens::open(home).unwrap();
        prop_assert!(tokens.authenticate("").is_none());
        Ok(())
    });
}
