//! What all flags of all programs have in common: a twin in the environment, a key in a
//! configuration file, and `--print-config`, which says what is in force and where it comes from.
//!
//! The twin of `--port` of `millrace-coordinator serve` is `MILLRACE_COORDINATOR_PORT`: the program,
//! the commands on the way to the flag (but for the program's main command), the flag. Where a flag
//! names a variable of its own (`MILLRACE_DIR`), that one counts. A key of the file stands in the
//! table of its command: `port = 8000` below `[serve]`. A flag wins over its twin, the twin over
//! the file, the file over the default.
//!
//! Nothing here reads a file by itself: the caller passes how.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use clap::builder::FalseyValueParser;
use clap::error::ErrorKind;
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command, Parser};
use toml::{Table, Value};

const CONFIG: &str = "config";
const PRINT_CONFIG: &str = "print-config";

/// How a program's twins begin.
#[derive(Clone, Copy, Debug)]
pub struct Program {
    /// Before everything else, such as `MILLRACE_COORDINATOR`.
    pub prefix: &'static str,
    /// The command whose name twins leave out; empty for none.
    pub main: &'static str,
}

/// What the command line asks for.
#[derive(Debug)]
pub enum Parsed<T> {
    /// To run.
    Run(T),
    /// To print this and end.
    Print(String),
}

/// The whole parse of a `main`: prints help, version, settings or what is wrong, and ends the
/// process where there is nothing to run.
pub fn parse_or_exit<T: Parser>(program: Program) -> T {
    let read = |path: &Path| std::fs::read_to_string(path);
    match parse::<T>(program, std::env::args_os().collect(), &read) {
        Ok(Parsed::Run(cli)) => cli,
        Ok(Parsed::Print(text)) => {
            // A reader that left is a clean end.
            let _ = io::Write::write_all(&mut io::stdout(), text.as_bytes());
            std::process::exit(0)
        }
        Err(e) => e.exit(),
    }
}

/// Parses `args`, of which the first is the program's name; `read` reads the configuration file.
///
/// # Errors
/// As clap; also if the file cannot be read or names what is not there.
pub fn parse<T: Parser>(
    program: Program,
    args: Vec<OsString>,
    read: &dyn Fn(&Path) -> io::Result<String>,
) -> Result<Parsed<T>, clap::Error> {
    let mut command = extend(T::command(), program);
    let file = config_file(&args, program);
    let mut keys = Vec::new();
    if let Some(file) = &file {
        let wrong = |e: String| failed(format!("{}: {e}", file.to_string_lossy()));
        let text = read(Path::new(file)).map_err(|e| wrong(e.to_string()))?;
        let table: Table = toml::from_str(&text).map_err(|e| wrong(e.to_string()))?;
        command = apply(command, &table, &mut Vec::new(), &mut keys).map_err(wrong)?;
    }
    let matches = command.clone().try_get_matches_from(args)?;
    if matches.get_flag(PRINT_CONFIG) {
        return Ok(Parsed::Print(report(&command, &matches, &keys)));
    }
    T::from_arg_matches(&matches).map(Parsed::Run).map_err(|e| e.format(&mut command))
}

/// The program's commands with `--config`, `--print-config` and every flag's twin.
pub fn extend(command: Command, program: Program) -> Command {
    let config = Arg::new(CONFIG)
        .long(CONFIG)
        .value_name("FILE")
        .global(true)
        .help_heading("Configuration")
        .help("TOML file of flags: 'port = 8000' below [serve] is --port of serve");
    let print = Arg::new(PRINT_CONFIG)
        .long(PRINT_CONFIG)
        .action(ArgAction::SetTrue)
        .global(true)
        .help_heading("Configuration")
        .help("Print every setting and where it comes from, as such a file, and end");
    with_twins(command.arg(config).arg(print), program, &mut Vec::new())
}

/// The name of a flag's variable.
pub fn twin(program: Program, commands: &[String], flag: &str) -> String {
    let skip = usize::from(commands.first().is_some_and(|first| first == program.main));
    let mut name = program.prefix.to_owned();
    for part in commands.iter().skip(skip).map(String::as_str).chain([flag]) {
        name.push('_');
        name.extend(part.chars().map(|c| if c == '-' { '_' } else { c.to_ascii_uppercase() }));
    }
    name
}

fn with_twins(command: Command, program: Program, path: &mut Vec<String>) -> Command {
    let command = command.mut_args(|arg| {
        let Some(long) = arg.get_long() else { return arg };
        if arg.get_env().is_some() || ["help", "version", PRINT_CONFIG].contains(&long) {
            return arg;
        }
        let name = twin(program, path, long);
        let switch = matches!(arg.get_action(), ArgAction::SetTrue);
        let arg = arg.env(leaked(name));
        if switch { arg.value_parser(FalseyValueParser::new()) } else { arg }
    });
    command.mut_subcommands(|sub| {
        path.push(sub.get_name().to_owned());
        let sub = with_twins(sub, program, path);
        path.pop();
        sub
    })
}

/// clap borrows names for as long as the program runs; they are made once.
fn leaked(text: String) -> &'static str {
    Box::leak(text.into_boxed_str())
}

fn failed(message: String) -> clap::Error {
    clap::Error::raw(ErrorKind::Io, format!("{message}\n"))
}

/// The file that `--config` or its twin names.
fn config_file(args: &[OsString], program: Program) -> Option<OsString> {
    let mut given = args.iter().skip(1).take_while(|arg| *arg != "--");
    while let Some(arg) = given.next() {
        let Some(text) = arg.to_str() else { continue };
        if text == "--config" {
            return given.next().cloned();
        }
        if let Some(file) = text.strip_prefix("--config=") {
            return Some(file.into());
        }
    }
    std::env::var_os(twin(program, &[], CONFIG)).filter(|file| !file.is_empty())
}

/// A key that the file sets: the commands on the way to it, and its id.
type Key = (Vec<String>, String);

/// Makes what the file says the defaults.
fn apply(
    mut command: Command,
    table: &Table,
    path: &mut Vec<String>,
    keys: &mut Vec<Key>,
) -> Result<Command, String> {
    for (name, value) in table {
        if let Value::Table(inner) = value {
            if command.find_subcommand(name).is_none() {
                return Err(format!("there is no command '{}'", place(path, name)));
            }
            path.push(name.clone());
            let mut result = Ok(());
            command = command.mut_subcommand(name, |sub| {
                apply(sub.clone(), inner, path, keys).unwrap_or_else(|e| {
                    result = Err(e);
                    sub
                })
            });
            result?;
            path.pop();
            continue;
        }
        let flag = command.get_arguments().find(|arg| arg.get_long() == Some(name));
        let flag = flag.filter(|arg| ![CONFIG, PRINT_CONFIG].contains(&arg.get_id().as_str()));
        let id = flag.ok_or_else(|| format!("there is no flag --{}", place(path, name)))?.get_id();
        let id = id.to_string();
        let values = texts(value).ok_or_else(|| {
            format!("{}: give text, a number, true, false, or a list of these", place(path, name))
        })?;
        command = command.mut_arg(&id, |arg| arg.required(false).default_values(values));
        keys.push((path.clone(), id));
    }
    Ok(command)
}

fn place(path: &[String], name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{name} of [{}]", path.join(".")) }
}

/// A value as it would be typed.
fn texts(value: &Value) -> Option<Vec<&'static str>> {
    let text = match value {
        Value::String(s) => s.clone(),
        Value::Integer(n) => n.to_string(),
        Value::Float(n) => n.to_string(),
        Value::Boolean(b) => b.to_string(),
        Value::Array(list) => {
            let each: Option<Vec<_>> = list.iter().map(texts).collect();
            return each.map(|lists| lists.concat());
        }
        Value::Datetime(_) | Value::Table(_) => return None,
    };
    Some(vec![leaked(text)])
}

/// Every setting of the command that was given, as a configuration file, with its source.
fn report(command: &Command, matches: &ArgMatches, keys: &[Key]) -> String {
    let (mut command, mut matches, mut path) = (command, matches, Vec::new());
    let mut text = String::new();
    loop {
        if !path.is_empty() {
            text.push_str(&format!("\n[{}]\n", path.join(".")));
        }
        for arg in command.get_arguments() {
            let shown = arg.get_long().filter(|l| ![CONFIG, PRINT_CONFIG, "help"].contains(l));
            if let Some(long) = shown {
                let key = keys.iter().any(|(p, id)| *p == path && id == arg.get_id().as_str());
                text.push_str(&line(arg, long, matches, key));
            }
        }
        let Some((name, inner)) = matches.subcommand() else { return text };
        let Some(sub) = command.find_subcommand(name) else { return text };
        (command, matches) = (sub, inner);
        path.push(name.to_owned());
    }
}

fn line(arg: &Arg, long: &str, matches: &ArgMatches, in_file: bool) -> String {
    let id = arg.get_id().as_str();
    let variable = arg.get_env().map(|name| name.to_string_lossy()).unwrap_or_default();
    let source = match matches.value_source(id) {
        Some(ValueSource::CommandLine) => "flag".to_owned(),
        Some(ValueSource::EnvVariable) => format!("environment, {variable}"),
        Some(_) if in_file => "file".to_owned(),
        Some(_) => "default".to_owned(),
        None => format!("not set; {variable}"),
    };
    let raw = matches.get_raw(id).into_iter().flatten();
    let values: Vec<String> = raw.map(|value| toml_value(&value.to_string_lossy())).collect();
    let (mark, value) = match values.as_slice() {
        [] => ("# ", String::new()),
        _ if arg.is_hide_env_values_set() => ("# ", "(hidden)".to_owned()),
        [one] => ("", one.clone()),
        many => ("", format!("[{}]", many.join(", "))),
    };
    format!("{:<44}# {source}\n", format!("{mark}{long} = {value}"))
}

/// A typed value in TOML: numbers and truths bare, everything else as text.
fn toml_value(text: &str) -> String {
    let bare = text.parse::<i64>().is_ok_and(|n| n.to_string() == text);
    if bare || ["true", "false"].contains(&text) {
        return text.to_owned();
    }
    Value::String(text.to_owned()).to_string()
}
