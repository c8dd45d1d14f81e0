//! Files that documents name exist, and the client in PROTOCOL.md survives network failures.

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead as _, BufReader, Write as _},
    net::{TcpListener, TcpStream},
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use crate::harness::skip::skip_without_program;
use seawall_proto::{
    close::{Close, EndReason, Restart},
    frame::{DeviceFrame, ErrorCode, ServerFrame},
    id::RuleId,
    refusal::{Code, Hint},
};
use serde_json::{Value, value::RawValue};

/// Maximum time for the documented client to connect, and to reconnect. Its maximum wait here is 5 s.
const CLIENT_TIME_MAX: Duration = Duration::from_secs(30);

#[test]
fn security_names_tests_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("SECURITY.md")).unwrap();

    let named: Vec<&str> = text.split('`').filter(|part| part.ends_with(".rs")).collect();

    assert!(named.len() > 30, "{named:?}");
    for path in named {
        assert!(root.join(path).exists(), "{path}");
    }
}

#[test]
fn architecture_names_files_that_exist() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("docs/ARCHITECTURE.md")).unwrap();
    let (_, table) = text.split_once("## Where is").unwrap();
    let (table, _) = table.split_once("\n## ").unwrap();

    let named: Vec<&str> = table.split('`').skip(1).step_by(2).collect();

    assert!(named.len() > 30, "{named:?}");
    for path in named {
        assert!(path.contains('/') && root.join(path).exists(), "{path}");
    }
}

/// The table of PROTOCOL.md below `heading`, as the cells of its rows.
fn protocol_table(heading: &str) -> Vec<Vec<String>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("docs/PROTOCOL.md")).unwrap();
    let (_, rest) = text.split_once(&format!("\n## {heading}\n")).unwrap();
    let rows = rest.lines().skip_while(|line| !line.starts_with("|---"));
    let rows = rows.skip(1).take_while(|line| line.starts_with('|'));
    rows.map(|row| row.split('|').skip(1).map(|cell| cell.trim().to_owned()).collect())
        .collect()
}

#[test]
fn protocol_lists_the_code_and_reason_of_every_close() {
    let after = Duration::from_secs(1);
    let restart = |why| Close::Restart {
        why,
        hint: Hint { after, slot: None },
    };
    let closes = [
        Close::Normal,
        Close::Protocol,
        Close::WrongKind,
        Close::NotUtf8,
        Close::Policy,
        Close::TooBig,
        restart(Restart::Draining),
        restart(Restart::Ageing),
        Close::Evicted { after },
        Close::HeartbeatMissed { after },
        Close::Disabled { after },
        Close::Disconnected { after },
        Close::Replaced,
        Close::Revoked,
    ];
    let without_frame = ["client_gone", "slow_reader", "shutdown", "failed"];
    let sent: BTreeSet<_> = closes.iter().map(Close::as_str).collect();
    let counted = EndReason::ALL
        .map(EndReason::as_str)
        .into_iter()
        .filter(|reason| !without_frame.contains(reason));
    assert_eq!(counted.collect::<BTreeSet<_>>(), sent, "a close is missing here");

    let listed: BTreeMap<String, String> = protocol_table("Close codes")
        .into_iter()
        .filter(|row| row[0].parse::<u16>().is_ok())
        .map(|row| (row[1].clone(), row[0].clone()))
        .collect();

    let expected = closes.iter().map(|close| {
        let reason = close.reason();
        let text = match (close, reason.starts_with('{')) {
            (Close::Normal, _) => "none".to_owned(),
            (
                Close::Restart {
                    why: Restart::Draining, ..
                },
                _,
            ) => "`draining` with a hint and `\"slot\":\"…\"` if it fits".to_owned(),
            (
                Close::Restart {
                    why: Restart::Ageing, ..
                },
                _,
            ) => "`ageing` with the same".to_owned(),
            (_, true) => format!("`{}` with a hint", close.as_str()),
            (_, false) => format!("`{reason}`"),
        };
        (text, close.code().to_string())
    });
    assert_eq!(listed, expected.collect());
}

#[test]
fn protocol_lists_the_status_and_code_of_every_refusal() {
    let listed = protocol_table("Being refused").into_iter().flat_map(|row| {
        let codes = row[1].split(", ").map(|code| code.trim_matches('`').to_owned());
        let statuses = row[0].split(", ").map(|status| status.parse().unwrap());
        codes.zip(statuses).collect::<Vec<(String, u16)>>()
    });

    let expected = Code::ALL.map(|code| (code.as_str().to_owned(), code.status()));
    assert_eq!(listed.collect::<BTreeSet<_>>(), expected.into());
}

#[test]
fn schema_of_frames_has_the_fields_of_every_frame() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("docs/frames.schema.json")).unwrap();
    let schema: Value = serde_json::from_str(&text).unwrap();
    let payload = RawValue::from_string("{}".to_owned()).unwrap();
    let gateway = [
        ServerFrame::Welcome {
            session: "s".into(),
            heartbeat_ms: 1,
            backoff_cap_ms: 1,
            resume: Some("r".into()),
            server_time: "t".into(),
        },
        ServerFrame::Resume { token: "t".into() },
        ServerFrame::Message {
            id: "i".into(),
            payload: &payload,
        },
        ServerFrame::Ack { id: "i".into() },
        ServerFrame::Reconnect {
            after_ms: 1,
            slot: Some("s".into()),
            reason: "r".into(),
        },
        ServerFrame::Update {
            rule: RuleId(uuid::Uuid::nil()),
            update: &payload,
        },
        ServerFrame::Error {
            code: ErrorCode::BadFrame,
            detail: "d".into(),
        },
    ];
    let device = [
        DeviceFrame::Heartbeat,
        DeviceFrame::Message {
            id: "i".into(),
            topic: Some("t".into()),
            payload: Some(&payload),
        },
        DeviceFrame::Ack { id: "i".into() },
    ];

    let sides = [
        ("gateway", gateway.iter().map(ServerFrame::to_json).collect::<Vec<_>>()),
        ("device", device.iter().map(DeviceFrame::to_json).collect()),
    ];
    for (side, frames) in sides {
        let described = schema["$defs"][side]["oneOf"].as_array().unwrap();
        let fields = |object: &Value| object.as_object().unwrap().keys().cloned().collect::<BTreeSet<_>>();
        let described: Vec<_> = described
            .iter()
            .map(|frame| {
                let properties = &frame["properties"];
                (properties["type"]["const"].clone(), fields(properties))
            })
            .collect();
        let sent: Vec<_> = frames
            .iter()
            .map(|frame| {
                let frame: Value = serde_json::from_str(frame).unwrap();
                (frame["type"].clone(), fields(&frame))
            })
            .collect();
        assert_eq!(described, sent);
    }
}

/// Behaviour of a server on the first connection of a client, whose request it has read.
type Behaviour = (&'static str, fn(&mut TcpStream, &str) -> std::io::Result<()>);

const BEHAVIOURS: [Behaviour; 12] = [
    ("closes at once", |_, _| Ok(())),
    ("resets", |stream, _| {
        socket2::SockRef::from(&*stream).set_linger(Some(Duration::ZERO))
    }),
    ("sends garbage", |stream, _| {
        stream.write_all(b"\x16\x03\x01\0\xffgarbage\r\n\r\n")
    }),
    ("breaks off in the head", |stream, _| {
        stream.write_all(b"HTTP/1.1 101 Switching Pro")
    }),
    ("refuses with a hint", |stream, _| {
        stream.write_all(
            b"HTTP/1.1 503 x\r\nSeawall-Retry-After-Ms: 200\r\nSeawall-Slot: abc\r\nContent-Length: 0\r\n\r\n",
        )
    }),
    ("refuses with a hint that makes no sense", |stream, _| {
        stream.write_all(b"HTTP/1.1 503 x\r\nSeawall-Retry-After-Ms: soon\r\nContent-Length: 2\r\n\r\n\xff\xfe")
    }),
    ("sends no JSON after the 101", |stream, key| {
        upgrade(stream, key)?;
        stream.write_all(b"\x81\x02{]\x81\x02[]\x81\x0a{\"type\":1}")
    }),
    ("sends a frame that is not one", |stream, key| {
        upgrade(stream, key)?;
        stream.write_all(b"\xff\xff\xff\xff")
    }),
    ("closes with a reason that breaks off", |stream, key| {
        upgrade(stream, key)?;
        stream.write_all(b"\x88\x10\x0f\xa0{\"retry_after")
    }),
    ("closes with a time", |stream, key| {
        upgrade(stream, key)?;
        stream.write_all(b"\x88\x18\x0f\xa0{\"retry_after_ms\":200}")
    }),
    ("closes with a time beyond every number", |stream, key| {
        upgrade(stream, key)?;
        stream.write_all(b"\x88\x1a\x0f\xa0{\"retry_after_ms\":1e999}")
    }),
    ("breaks off in a frame", |stream, key| {
        upgrade(stream, key)?;
        stream.write_all(b"\x81\x7e\xff")
    }),
];

fn upgrade(stream: &mut TcpStream, key: &str) -> std::io::Result<()> {
    let accept = tokio_tungstenite::tungstenite::handshake::derive_accept_key(key.as_bytes());
    write!(
        stream,
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Accept: {accept}\r\n\
         Sec-WebSocket-Protocol: seawall.v1\r\n\r\n"
    )
}

/// Reads a request head. Returns its WebSocket key.
fn read_request(stream: &TcpStream) -> std::io::Result<String> {
    let mut key = String::new();
    for line in BufReader::new(stream).lines() {
        let line = line?;
        if line.is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("sec-websocket-key")
        {
            value.trim().clone_into(&mut key);
        }
    }
    Ok(key)
}

/// Accepts a connection within the time.
fn accept(listener: &TcpListener, time: Duration) -> Option<TcpStream> {
    listener.set_nonblocking(true).unwrap();
    let end = Instant::now() + time;
    while Instant::now() < end {
        if let Ok((stream, _)) = listener.accept() {
            stream.set_nonblocking(false).unwrap();
            return Some(stream);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    None
}

/// `PYTHON_WEBSOCKETS` names a program with the `websockets` package; `./test` installs it.
#[test]
fn documented_client_comes_back_however_a_connection_fails() {
    let Some(python) = std::env::var_os("PYTHON_WEBSOCKETS") else {
        skip_without_program("PYTHON_WEBSOCKETS names no program: the client of PROTOCOL.md is not run");
        return;
    };
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let text = std::fs::read_to_string(root.join("docs/PROTOCOL.md")).unwrap();
    let (_, client) = text.split_once("```python\n").unwrap();
    let (client, _) = client.split_once("```").unwrap();
    let home = tempfile::tempdir().unwrap();
    let file = home.path().join("client.py");
    std::fs::write(&file, client).unwrap();

    let came_back = |(name, behave): &Behaviour| {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = format!("ws://{}/v1/connect", listener.local_addr().unwrap());
        let mut child = Command::new(&python)
            .arg(&file)
            .args([
                &url,
                "01890a5d-ac96-774b-bcce-b302099a8057",
                "a secret of a device",
                "3.8.0",
            ])
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let first = accept(&listener, CLIENT_TIME_MAX);
        let is_first_there = first.is_some();
        if let Some(mut stream) = first {
            let key = read_request(&stream).unwrap();
            behave(&mut stream, &key).unwrap();
        }
        let is_back = accept(&listener, CLIENT_TIME_MAX).is_some();
        let _ = child.kill();
        let output = child.wait_with_output().unwrap();
        let problem = String::from_utf8_lossy(&output.stderr).into_owned();
        (is_first_there && is_back)
            .then_some(())
            .ok_or_else(|| format!("{name}: {problem}"))
    };
    let outcomes: Vec<Result<(), String>> = std::thread::scope(|scope| {
        let running: Vec<_> = BEHAVIOURS
            .iter()
            .map(|behaviour| scope.spawn(|| came_back(behaviour)))
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect()
    });

    assert!(outcomes.iter().all(Result::is_ok), "{outcomes:#?}");
}
