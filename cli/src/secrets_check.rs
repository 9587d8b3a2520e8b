//! No secret is shown by `--print-config` or `--help` of any program, wherever it comes from: every
//! flag that carries one is hidden, and whoever adds another one has to say so here.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use clap::{Arg, Command, CommandFactory, Parser};
use millrace_coordinator::cli as coordinator;
use millrace_node::cli as node;
use millrace_shared::flags::{Parsed, Program, extend, parse};

use crate::{Cli, PROGRAM};

/// Flags that carry a secret themselves; all others name the file that holds it.
const SECRETS: [&str; 1] = ["millrace-node run --token"];
const SECRET: &str = "mlr-Zanzibar-7731";

/// Whether a flag sounds like a secret and its value is neither a file nor a number.
fn sounds_secret(arg: &Arg) -> bool {
    let words = ["token", "key", "secret", "password", "auth", "credential", "pem"];
    let long = arg.get_long().unwrap_or_default();
    let values: Vec<_> =
        arg.get_value_names().unwrap_or_default().iter().map(|n| n.as_str()).collect();
    let harmless = ["FILE", "FILE.json", "DIR", "PATH", "N", "TOKENS", "TIME"];
    arg.get_action().takes_values()
        && long.split('-').any(|word| words.contains(&word))
        && !values.iter().any(|value| harmless.contains(value))
}

/// The flags of all commands below this one for which `pick` holds, with the commands before them.
fn flags(name: &str, command: &Command, pick: &dyn Fn(&Arg) -> bool) -> Vec<(String, Arg)> {
    let own = command.get_arguments().filter(|arg| pick(arg));
    let own =
        own.map(|arg| (format!("{name} --{}", arg.get_long().unwrap_or_default()), arg.clone()));
    let below = command.get_subcommands();
    let below = below.flat_map(|sub| flags(&format!("{name} {}", sub.get_name()), sub, pick));
    own.chain(below).collect()
}

fn programs() -> [(&'static str, Command); 3] {
    [
        ("millrace", extend(Cli::command(), PROGRAM)),
        ("millrace-coordinator", extend(coordinator::Cli::command(), coordinator::PROGRAM)),
        ("millrace-node", extend(node::Cli::command(), node::PROGRAM)),
    ]
}

#[test]
fn every_flag_that_carries_a_secret_is_known_and_hidden() {
    let mut hidden = Vec::new();
    for (name, command) in programs() {
        for (flag, arg) in flags(name, &command, &sounds_secret) {
            assert!(SECRETS.contains(&flag.as_str()), "{flag}: hide its value, and name it here");
            assert!(arg.is_hide_default_value_set(), "{flag}: --help would show it out of a file");
        }
        let own = flags(name, &command, &|arg| arg.is_hide_env_values_set());
        hidden.extend(own.into_iter().map(|(flag, _)| flag));
    }
    assert_eq!(hidden, SECRETS);
}

/// What a program prints for these words with this configuration file.
fn printed<T: Parser>(program: Program, words: &str, file: &str) -> String {
    let args: Vec<OsString> = words.split(' ').map(OsString::from).collect();
    let read = |_: &Path| -> io::Result<String> { Ok(file.to_owned()) };
    match parse::<T>(program, args, &read) {
        Ok(Parsed::Print(text)) => text,
        Ok(Parsed::Run(_)) => panic!("'{words}' would run"),
        Err(e) => e.to_string(),
    }
}

#[test]
fn settings_and_help_show_no_secret() {
    let file = format!("[run]\ntoken = \"{SECRET}\"\n");
    let shown = |words: &str, file: &str| printed::<node::Cli>(node::PROGRAM, words, file);
    let by_flag = shown(&format!("millrace-node run --token {SECRET} --print-config"), "");
    let by_file = shown("millrace-node run --config a.toml --print-config", &file);
    for (text, source) in [(&by_flag, "flag"), (&by_file, "file")] {
        let line = text.lines().find(|line| line.contains("token =")).unwrap();
        assert!(line.contains("(hidden)") && line.ends_with(source), "{line}");
        assert!(!text.contains(SECRET), "{text}");
    }
    // Wrong as it is, and beside other mistakes.
    let texts = [
        shown("millrace-node run --config a.toml --help", &file),
        shown("millrace-node run --config a.toml --port 1", &file),
        shown(&format!("millrace-node run --token {SECRET} --token-file f --print-config"), ""),
        shown(
            "millrace-node run --config a.toml",
            &format!("[run]\ntoken = {{ a = \"{SECRET}\" }}\n"),
        ),
    ];
    assert!(texts[0].contains("--token"), "{}", texts[0]);
    assert!(texts.iter().all(|text| !text.contains(SECRET)), "{texts:?}");
}
