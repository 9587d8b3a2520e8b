//! The program as an operator meets it: what it prints, where, and with which exit code. Whole
//! clusters are tested elsewhere.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The program with an environment of its own.
fn coordinator(home: &Path, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millrace-coordinator"));
    for variable in ["MILLRACE_DIR", "MILLRACE_THREADS", "RUST_LOG"] {
        command.env_remove(variable);
    }
    command
        .args(args)
        .env("HOME", home)
        .env("MILLRACE_CACHE", home.join("cache"))
        .env("NO_COLOR", "1")
        .current_dir(home)
        .stdin(Stdio::null());
    command.output().expect("the program starts")
}

fn home() -> tempfile::TempDir {
    tempfile::tempdir().expect("a temporary folder")
}

#[track_caller]
fn fails(output: &Output, code: i32, parts: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "stderr: {stderr}");
    for part in parts {
        assert!(stderr.contains(part), "'{part}' is not in: {stderr}");
    }
    assert!(output.stdout.is_empty(), "a failure prints nothing to stdout");
}

#[track_caller]
fn succeeds(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "stderr: {stderr}");
    String::from_utf8_lossy(&output.stdout).trim_end().to_owned()
}

fn mode(path: &Path) -> u32 {
    path.metadata().expect("the file is there").permissions().mode() & 0o777
}

#[test]
fn help_names_flags_and_ports() {
    let home = home();
    let text = succeeds(&coordinator(home.path(), &["--help"]));
    for part in ["init", "serve", "token", "key", "Examples:", "8000/tcp", "8001/udp", "8002/udp"] {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
    let text = succeeds(&coordinator(home.path(), &["serve", "--help"]));
    for part in ["--model", "--stages", "--quic", "--cluster", "--kv-cache-tokens", "--cuts"] {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
}

#[test]
fn wrong_flags_exit_with_two() {
    let home = home();
    let cases: [(&[&str], &str); 6] = [
        (&[], "Usage"),
        (&["reign"], "reign"),
        (&["serve"], "--model"),
        (&["serve", "--model", "m", "--stages", "0"], "--stages"),
        (&["serve", "--model", "m", "--quic", "somewhere"], "--quic"),
        (&["token", "create", "--expires", "soon"], "'soon' is not a time"),
    ];
    for (args, part) in cases {
        fails(&coordinator(home.path(), args), 2, &[part]);
    }
}

#[test]
fn init_makes_a_private_folder_once() {
    let home = home();
    let dir = home.path().join("c");
    let init = ["init", "--dir", "c", "--advertise", "10.0.0.1"];
    assert!(succeeds(&coordinator(home.path(), &init)).contains("serve --dir c"));
    let client = std::fs::read(dir.join("client.toml")).expect("client.toml");
    assert!(String::from_utf8_lossy(&client).contains("10.0.0.1:8001"));
    for file in ["ca.key", "client.toml"] {
        assert_eq!(mode(&dir.join(file)), 0o600, "{file}");
    }
    let ca = std::fs::read(dir.join("ca.pem")).expect("the CA");
    assert!(succeeds(&coordinator(home.path(), &init)).contains("is there already"));
    assert_eq!(std::fs::read(dir.join("ca.pem")).expect("the CA"), ca);
}

#[test]
fn tokens() {
    let home = home();
    fails(&coordinator(home.path(), &["token", "create", "--dir", "c"]), 1, &["init"]);
    succeeds(&coordinator(home.path(), &["init", "--dir", "c", "--advertise", "10.0.0.1"]));
    let create = ["token", "create", "--dir", "c", "--uses", "3", "--expires", "30m"];
    let (one, two) = (
        succeeds(&coordinator(home.path(), &create)),
        succeeds(&coordinator(home.path(), &create)),
    );
    assert_ne!(one, two);
    let token: millrace_net::join::JoinToken = one.parse().expect("a token");
    assert_eq!(token.addr, "10.0.0.1:8001");
    // Only a hash of the secret is kept.
    let secret = token.secret_text();
    for record in std::fs::read_dir(home.path().join("c/tokens")).expect("records") {
        let path = record.expect("a record").path();
        let text = std::fs::read(&path).expect("a record");
        assert!(!String::from_utf8_lossy(&text).contains(&secret), "{}", path.display());
        assert!(!path.to_string_lossy().contains(&secret), "{}", path.display());
    }
}

#[test]
fn keys() {
    let home = home();
    succeeds(&coordinator(home.path(), &["init", "--dir", "c"]));
    let key = |args: &[&str]| {
        let (command, rest) = args.split_first().expect("a command");
        coordinator(home.path(), &[&["key", command, "--dir", "c"], rest].concat())
    };
    let secret = succeeds(&key(&["create", "--label", "alice"]));
    let list = succeeds(&key(&["list"]));
    let line = list.lines().find(|l| l.contains("alice")).expect("alice is listed");
    assert!(!list.contains(&secret), "a list shows no secrets");
    let id = line.split_whitespace().next().expect("an id");
    assert!(succeeds(&key(&["revoke", id])).contains(id));
    assert!(!succeeds(&key(&["list"])).contains("alice"));
    fails(&key(&["revoke", id]), 1, &[id, "key list"]);
}
