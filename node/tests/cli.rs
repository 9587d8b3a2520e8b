//! The program as a user meets it: what it prints, where, and with which exit code. Whole clusters
//! are tested elsewhere.

use std::path::Path;
use std::process::{Command, Output, Stdio};

/// The program with an environment of its own.
fn node(home: &Path, args: &[&str]) -> Output {
    command(home, args).output().expect("the program starts")
}

fn command(home: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millrace-node"));
    for variable in ["MILLRACE_TOKEN", "MILLRACE_DIR", "MILLRACE_THREADS", "RUST_LOG"] {
        command.env_remove(variable);
    }
    command
        .args(args)
        .env("HOME", home)
        .env("MILLRACE_CACHE", home.join("cache"))
        .env("NO_COLOR", "1")
        .current_dir(home)
        .stdin(Stdio::null());
    command
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

#[test]
fn help_names_flags_and_ports() {
    let home = home();
    for (args, parts) in [
        (&["--help"][..], &["run", "probe", "Examples:", "8010/udp"][..]),
        (&["run", "--help"], &["--coordinator", "--token", "--weights", "--memory", "--threads"]),
    ] {
        let output = node(home.path(), args);
        let text = String::from_utf8_lossy(&output.stdout);
        assert_eq!(output.status.code(), Some(0), "{text}");
        assert!(parts.iter().all(|part| text.contains(part)), "{text}");
    }
}

#[test]
fn wrong_flags_exit_with_two() {
    let home = home();
    let cases: [(&[&str], &str); 5] = [
        (&[], "Usage"),
        (&["walk"], "walk"),
        (&["run", "--memory", "lots"], "'lots' is not a size"),
        (&["run", "--listen", "somewhere"], "--listen"),
        (&["run", "--kv-cache-dtype", "f8"], "f8"),
    ];
    for (args, part) in cases {
        fails(&node(home.path(), args), 2, &[part]);
    }
}

#[test]
fn probe_shows_the_machine() {
    let home = home();
    let output = node(home.path(), &["probe"]);
    assert_eq!(output.status.code(), Some(0));
    let text = String::from_utf8_lossy(&output.stdout);
    for part in ["host", "processor", "threads", "memory", "numerics"] {
        assert!(text.contains(part), "'{part}' is not in: {text}");
    }
}

#[test]
fn secrets_are_not_shown() {
    let home = home();
    let secret = "mlrj1.Zanzibar-7731";
    std::fs::write(home.path().join("a.toml"), format!("[run]\ntoken = \"{secret}\"\n"))
        .expect("a file");
    let shown = |args: &[&str], environment: bool| {
        let mut command = command(home.path(), args);
        if environment {
            command.env("MILLRACE_TOKEN", secret);
        }
        let output = command.output().expect("the program starts");
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        assert!(!text.contains("Zanzibar"), "{text}");
        text
    };
    for (args, environment, source) in [
        (&["run", "--print-config", "--token", secret][..], false, "flag"),
        (&["run", "--print-config"], true, "environment, MILLRACE_TOKEN"),
        (&["run", "--print-config", "--config", "a.toml"], false, "file"),
    ] {
        let text = shown(args, environment);
        let line = text.lines().find(|line| line.contains("token = "));
        let line = line.unwrap_or_else(|| panic!("no token: {text}"));
        assert!(line.contains("(hidden)") && line.ends_with(source), "{line}");
    }
    assert!(shown(&["run", "--help"], true).contains("--token"));
    assert!(shown(&["run", "--help", "--config", "a.toml"], false).contains("--token"));
    // Beside other mistakes.
    shown(&["run", "--memory", "lots"], true);
    shown(&["run", "--token", secret, "--token-file", "t"], false);
}

#[test]
fn joining_needs_a_token_and_a_sound_one() {
    let home = home();
    let run = ["run", "--dir", "node", "--listen", "127.0.0.1:0"];
    fails(&node(home.path(), &run), 1, &["not a member yet", "token create", "--token"]);
    let output = node(home.path(), &[&run[..], &["--token", "nonsense"]].concat());
    fails(&output, 1, &["--token"]);
}
