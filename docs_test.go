package grpcproxy_test

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/caddyserver/caddy/v2"
	"github.com/caddyserver/caddy/v2/caddyconfig"
	"github.com/caddyserver/caddy/v2/caddyconfig/caddyfile"

	"github.com/caddygrpc/caddy-grpc-proxy/healthcheck"
	"github.com/caddygrpc/caddy-grpc-proxy/transport"
)

// pages are the documents that tests hold to the code.
func pages(t *testing.T) []string {
	t.Helper()
	var list []string
	for _, pattern := range []string{"*.md", "docs/*.md", "examples/*.md"} {
		files, err := filepath.Glob(pattern)
		if err != nil {
			t.Fatal(err)
		}
		list = append(list, files...)
	}
	if len(list) < 8 {
		t.Fatalf("only %v found", list)
	}
	return list
}

func read(t *testing.T, file string) string {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(raw), "\r\n", "\n")
}

// block is a fenced block of a page.
type block struct {
	language, text string
	line           int
}

func blocks(page string) []block {
	var (
		list []block
		in   *block
	)
	n := 0
	for line := range strings.Lines(page) {
		n++
		fence, isFence := strings.CutPrefix(strings.TrimRight(line, "\n"), "```")
		switch {
		case isFence && in == nil:
			in = &block{language: fence, line: n}
		case isFence:
			list = append(list, *in)
			in = nil
		case in != nil:
			in.text += line
		}
	}
	return list
}

// TestDocsBlocks: every Caddyfile and every JSON in the documents loads.
func TestDocsBlocks(t *testing.T) {
	count := map[string]int{}
	for _, page := range pages(t) {
		for _, b := range blocks(read(t, page)) {
			count[b.language]++
			t.Run(fmt.Sprintf("%s:%d", page, b.line), func(t *testing.T) {
				switch b.language {
				case "caddyfile":
					loadable(t, b.text)
				case "json":
					validates(t, b.text)
				case "dockerfile":
					if b.text != read(t, "Dockerfile") {
						t.Error("differs from the file Dockerfile")
					}
				case "", "sh", "nginx":
				default:
					t.Errorf("what is %q? Blocks that are not tested are marked sh, nginx, or not at all", b.language)
				}
			})
		}
	}
	if count["caddyfile"] < 8 || count["json"] < 3 || count["dockerfile"] != 1 {
		t.Errorf("found blocks %v; this test looks in the wrong places", count)
	}
}

// TestDocsCatchAll: where calls go by service, a catch-all answers the rest. Caddy's own answer would be an empty 200.
func TestDocsCatchAll(t *testing.T) {
	texts := map[string]string{}
	for _, page := range pages(t) {
		for _, b := range blocks(read(t, page)) {
			if b.language == "caddyfile" {
				texts[fmt.Sprintf("%s:%d", page, b.line)] = b.text
			}
		}
	}
	files, err := filepath.Glob("examples/*.Caddyfile")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		texts[file] = read(t, file)
	}
	matched := regexp.MustCompile(`(?m)^\s*grpc_proxy @`)
	everything := regexp.MustCompile(`(?m)^\s*(grpc_proxy( [^@\n]|$)|grpc_respond [^@])`)
	found := 0
	for place, text := range texts {
		if !matched.MatchString(text) {
			continue
		}
		found++
		if !everything.MatchString(text) {
			t.Errorf("%s: a call that no matcher takes gets an empty answer; end with grpc_respond", place)
		}
	}
	if found < 5 {
		t.Errorf("%d places with services were found only", found)
	}
}

// TestExamples: every configuration in examples loads, and the page there names every file.
func TestExamples(t *testing.T) {
	files, err := filepath.Glob("examples/*")
	if err != nil || len(files) < 5 {
		t.Fatalf("found %v, %v", files, err)
	}
	index := read(t, "examples/README.md")
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			switch filepath.Ext(file) {
			case ".Caddyfile":
				loadable(t, read(t, file))
			case ".json":
				validates(t, read(t, file))
			case ".md":
				return
			}
			if !strings.Contains(index, "("+filepath.Base(file)+")") {
				t.Error("is not in examples/README.md")
			}
		})
	}
}

// loadable: the Caddyfile is formatted as `caddy fmt` does, adapts without a warning, and provisions.
func loadable(t *testing.T, text string) {
	t.Helper()
	if formatted := string(caddyfile.Format([]byte(text))); formatted != text {
		t.Errorf("not formatted; caddy fmt makes it:\n%s", formatted)
	}
	raw, warnings, err := caddyconfig.GetAdapter("caddyfile").Adapt([]byte(text), map[string]any{"filename": "Caddyfile"})
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range warnings {
		t.Error(w)
	}
	validates(t, string(raw))
}

// validates: the JSON provisions. Files that a reader has in /etc/caddy/tls are taken from testdata.
func validates(t *testing.T, text string) {
	t.Helper()
	if err := validateJSON([]byte(strings.ReplaceAll(text, "/etc/caddy/tls/", "testdata/tls/"))); err != nil {
		t.Error(err)
	}
}

var (
	codeSpan = regexp.MustCompile("`[^`]+`")
	link     = regexp.MustCompile(`\]\(([^)\s]+)\)`)
	heading  = regexp.MustCompile(`(?m)^#+ +(.+)$`)
)

// TestDocsLinks: relative links lead to a file, and to a heading in it.
func TestDocsLinks(t *testing.T) {
	for _, page := range pages(t) {
		text := read(t, page)
		for _, b := range blocks(text) {
			text = strings.ReplaceAll(text, b.text, "")
		}
		for _, m := range link.FindAllStringSubmatch(text, -1) {
			u, err := url.Parse(m[1])
			if err != nil {
				t.Errorf("%s: link %q: %v", page, m[1], err)
				continue
			}
			if u.IsAbs() {
				continue
			}
			target := page
			if u.Path != "" {
				target = filepath.Join(filepath.Dir(page), filepath.FromSlash(u.Path))
			}
			if _, err := os.Stat(target); err != nil {
				t.Errorf("%s: link %q leads nowhere: %v", page, m[1], err)
				continue
			}
			if u.Fragment != "" && !slices.Contains(anchors(read(t, target)), u.Fragment) {
				t.Errorf("%s: link %q: there is no such heading in %s", page, m[1], target)
			}
		}
	}
}

// anchors are the headings' names in links, by GitHub's rules.
func anchors(text string) []string {
	var list []string
	for _, m := range heading.FindAllStringSubmatch(text, -1) {
		list = append(list, strings.Map(func(r rune) rune {
			switch {
			case r == ' ':
				return '-'
			case r == '-', r == '_', '0' <= r && r <= '9', 'a' <= r && r <= 'z', r > 127:
				return r
			}
			return -1
		}, strings.ToLower(m[1])))
	}
	return list
}

// TestDocsOptions: the tables of docs/grpc_proxy.md name every word that the parser knows, and no other.
func TestDocsOptions(t *testing.T) {
	known := map[string]bool{}
	for _, word := range slices.Concat(
		caseWords(t, "caddyfile.go", "subdirective"), caseWords(t, "caddyfile_transport.go", "transportWord"),
		caseWords(t, "caddyfile_transport.go", "tlsWord"), caseWords(t, "caddyfile.go", "otherWord"),
		caseWords(t, "caddyfile_health.go", "healthWord"), caseWords(t, "caddyfile_health.go", "passiveWord"),
	) {
		known[word] = true
	}
	for _, word := range caseWords(t, "caddyfile_transport.go", "keepaliveWord") {
		known["keepalive "+word] = true
	}
	// A word that reads `name <value>` in the first column is documented as name; keepalive's words keep their block's.
	sameKeys(t, "docs/grpc_proxy.md", known, firstColumn(t, "docs/grpc_proxy.md", "| Option |", "| Word |"))

	words := map[string]bool{}
	for _, word := range caseWords(t, "matcher.go", "UnmarshalCaddyfile") {
		words[word] = true
	}
	sameKeys(t, "docs/matcher.md", words, firstColumn(t, "docs/matcher.md", "| Word |"))

	policies := map[string]bool{}
	for _, m := range caddy.GetModules("http.grpc_proxy.selection_policies") {
		policies[m.ID.Name()] = true
	}
	sameKeys(t, "docs/selection.md, policies", policies, firstColumn(t, "docs/selection.md", "| Policy |"))

	sources := map[string]bool{}
	for _, m := range caddy.GetModules("http.grpc_proxy.discovery") {
		sources[m.ID.Name()] = true
	}
	sameKeys(t, "docs/discovery.md, sources", sources, firstColumn(t, "docs/discovery.md", "| Source |"))
}

// TestDocsHealthJSON: docs/health.md names the JSON keys of every health option, and where they belong.
func TestDocsHealthJSON(t *testing.T) {
	page := read(t, "docs/health.md")
	for _, o := range []struct {
		place  string
		option any
	}{
		{"health_checks", healthcheck.Config{}},
		{"health_checks.active", healthcheck.Active{}},
		{"health_checks.active.check", healthcheck.GRPC{}},
		{"health_checks.active.check", healthcheck.HTTP{}},
		{"health_checks.passive", healthcheck.Passive{}},
		{"health_checks.passive.outlier_detection", healthcheck.OutlierDetection{}},
		{"health_checks.slow_start", healthcheck.SlowStart{}},
	} {
		if !strings.Contains(page, "`"+o.place) {
			t.Errorf("docs/health.md does not name %s", o.place)
		}
		for _, f := range reflect.VisibleFields(reflect.TypeOf(o.option)) {
			key, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if key == "per_rpc" {
				continue // it is there to be refused
			}
			if key != "" && !strings.Contains(page, "`"+key+"`") && !strings.Contains(page, "`"+o.place+"."+key) {
				t.Errorf("docs/health.md does not name %s.%s", o.place, key)
			}
		}
	}
}

// TestDocsSyntax: the syntax in docs/grpc_proxy.md is that of the parser's doc comment, word by word, and the README's is a
// part of it.
func TestDocsSyntax(t *testing.T) {
	full := map[string]bool{}
	for _, word := range syntaxWords(t, "docs/grpc_proxy.md") {
		full[word] = true
	}
	file, err := parser.ParseFile(token.NewFileSet(), "caddyfile.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	comment := map[string]bool{}
	ast.Inspect(file, func(n ast.Node) bool {
		if f, ok := n.(*ast.FuncDecl); ok && f.Name.Name == "UnmarshalCaddyfile" {
			for line := range strings.Lines(f.Doc.Text()) {
				if indented, ok := strings.CutPrefix(line, "\t"); ok {
					addWord(comment, indented)
				}
			}
		}
		return true
	})
	delete(full, "keepalive_interval") // reverse_proxy's other spelling, which the comment leaves out
	delete(comment, "keepalive_interval")
	sameKeys(t, "the syntax in docs/grpc_proxy.md", comment, full)
	for _, word := range syntaxWords(t, "README.md") {
		if !full[word] {
			t.Errorf("README.md has the word %q in its syntax, docs/grpc_proxy.md has not", word)
		}
	}
}

func syntaxWords(t *testing.T, page string) []string {
	t.Helper()
	words := map[string]bool{}
	for _, b := range blocks(read(t, page)) {
		if b.language == "" && strings.HasPrefix(b.text, "grpc_proxy [") {
			for line := range strings.Lines(b.text) {
				addWord(words, line)
			}
		}
	}
	if len(words) < 10 {
		t.Fatalf("%s has no syntax", page)
	}
	return slices.Collect(maps.Keys(words))
}

func addWord(words map[string]bool, line string) {
	if f := strings.Fields(line); len(f) > 0 && f[0] != "#" && f[0] != "}" && f[0] != "grpc_proxy" {
		words[f[0]] = true
	}
}

// TestDocsDefaults: defaults in the table are the code's.
func TestDocsDefaults(t *testing.T) {
	table := map[string]string{}
	for line := range strings.Lines(read(t, "docs/grpc_proxy.md")) {
		if cells := strings.Split(line, "|"); len(cells) == 5 {
			table[strings.Trim(strings.TrimSpace(cells[1]), "`")] = strings.Trim(strings.TrimSpace(cells[2]), "`")
		}
	}
	for option, want := range map[string]time.Duration{
		"dial_timeout": transport.DefaultDialTimeout, "keepalive": transport.DefaultIdleTimeout,
		"keepalive_interval": transport.DefaultPingInterval, "keepalive interval": transport.DefaultPingInterval,
		"keepalive timeout": transport.DefaultPingTimeout, "keepalive idle_timeout": transport.DefaultIdleTimeout,
	} {
		if got, err := time.ParseDuration(table[option]); err != nil || got != want {
			t.Errorf("the default of %s is %v, the table says %q", option, want, table[option])
		}
	}
	for option, want := range map[string]int{
		"max_conns": transport.DefaultMaxConns, "max_conns_per_host": transport.DefaultMaxConns, "queue_size": transport.DefaultQueueSize,
	} {
		if table[option] != strconv.Itoa(want) {
			t.Errorf("the default of %s is %d, the table says %q", option, want, table[option])
		}
	}
}

// TestDocsObserve: log fields and placeholders in the README are those of observe.go, and other pages invent none.
func TestDocsObserve(t *testing.T) {
	fields, placeholders := map[string]bool{}, map[string]bool{}
	for _, call := range callsIn(t, "inbound/web/log.go", "logFields") {
		if sel, ok := call.Fun.(*ast.SelectorExpr); ok && fmt.Sprint(sel.X) == "zap" {
			fields[stringOf(t, call.Args[0])] = true
		}
	}
	for _, name := range caseWords(t, "inbound/web/log.go", "placeholder") {
		placeholders["http.grpc_proxy."+name] = true
	}
	for _, name := range caseWords(t, "inbound/web/log.go", "upstreamPlaceholder") {
		placeholders["http.grpc_proxy.upstream."+name] = true
	}
	sameKeys(t, "README.md, log fields", fields, firstColumn(t, "README.md", "| Field |"))

	documented := map[string]bool{}
	for span := range firstColumn(t, "README.md", "| Placeholder |") {
		documented[strings.Trim(span, "{}")] = true
	}
	sameKeys(t, "README.md, placeholders", placeholders, documented)

	placeholder := regexp.MustCompile(`\{(http\.grpc_proxy\.[a-z_.]+)\}`)
	field := regexp.MustCompile(`\bgrpc_(service|method|status\w*|message\w*|reason|ended_by|attempts|bytes\w*|latency|first_byte)\b`)
	files := pages(t)
	examples, _ := filepath.Glob("examples/*")
	for _, page := range slices.Concat(files, examples, []string{"module.go"}) {
		text := read(t, page)
		for _, m := range placeholder.FindAllStringSubmatch(text, -1) {
			if !placeholders[m[1]] {
				t.Errorf("%s: there is no placeholder {%s}", page, m[1])
			}
		}
		for _, name := range field.FindAllString(text, -1) {
			if !fields[name] && !strings.HasPrefix(name, "grpc_message_") {
				t.Errorf("%s: there is no log field %s", page, name)
			}
		}
	}
}

// TestDocsReasons: docs/status.md has every reason, and no other.
func TestDocsReasons(t *testing.T) {
	reasons := map[string]bool{}
	file, err := parser.ParseFile(token.NewFileSet(), "proxy/status.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	ast.Inspect(file, func(n ast.Node) bool {
		if v, ok := n.(*ast.ValueSpec); ok && len(v.Values) == 1 && strings.HasPrefix(v.Names[0].Name, "Reason") {
			reasons[stringOf(t, v.Values[0])] = true
		}
		return true
	})
	documented := map[string]bool{}
	for line := range strings.Lines(read(t, "docs/status.md")) {
		if cells := strings.Split(line, "|"); len(cells) > 4 && strings.Contains(cells[3], "`") {
			name, _ := strings.CutSuffix(strings.TrimSpace(cells[3]), " °") // which marks those without details
			documented[strings.Trim(name, "`")] = true
		}
	}
	sameKeys(t, "docs/status.md", reasons, documented)
}

// sameKeys compares what the code knows with what a page has.
func sameKeys(t *testing.T, page string, code, docs map[string]bool) {
	t.Helper()
	if len(code) == 0 {
		t.Fatalf("%s: nothing was found in the code to compare it with", page)
	}
	for _, word := range slices.Sorted(maps.Keys(code)) {
		if !docs[word] {
			t.Errorf("%s lacks %s", page, word)
		}
	}
	for _, word := range slices.Sorted(maps.Keys(docs)) {
		if !code[word] {
			t.Errorf("%s has %s, which the code does not know", page, word)
		}
	}
}

// firstColumn collects the code spans in the first column of the tables with one of the heads.
func firstColumn(t *testing.T, page string, heads ...string) map[string]bool {
	t.Helper()
	words := map[string]bool{}
	in := false
	for line := range strings.Lines(read(t, page)) {
		switch {
		case !strings.HasPrefix(line, "|"):
			in = false
		case slices.ContainsFunc(heads, func(head string) bool { return strings.HasPrefix(line, head) }):
			in = true
		case in:
			for _, span := range codeSpan.FindAllString(strings.Split(line, "|")[1], -1) {
				words[strings.Trim(span, "`")] = true
			}
		}
	}
	if len(words) == 0 {
		t.Fatalf("%s has no table that begins with %q", page, heads)
	}
	return words
}

// caseWords are the strings in the cases of a function's switch over the word just read or looked up.
func caseWords(t *testing.T, file, function string) []string {
	t.Helper()
	var words []string
	ast.Inspect(funcOf(t, file, function), func(n ast.Node) bool {
		sw, ok := n.(*ast.SwitchStmt)
		if !ok || sw.Tag == nil {
			return true
		}
		switch tag := sw.Tag.(type) {
		case *ast.Ident: // word := p.Val()
			if tag.Name != "word" && tag.Name != "name" {
				return true
			}
		case *ast.CallExpr: // p.Val()
			if sel, ok := tag.Fun.(*ast.SelectorExpr); !ok || sel.Sel.Name != "Val" {
				return true
			}
		default:
			return true
		}
		for _, stmt := range sw.Body.List {
			for _, e := range stmt.(*ast.CaseClause).List {
				words = append(words, stringOf(t, e))
			}
		}
		return true
	})
	if len(words) == 0 {
		t.Fatalf("%s in %s has no switch over words", function, file)
	}
	return words
}

func callsIn(t *testing.T, file, function string) []*ast.CallExpr {
	t.Helper()
	var calls []*ast.CallExpr
	ast.Inspect(funcOf(t, file, function), func(n ast.Node) bool {
		if call, ok := n.(*ast.CallExpr); ok {
			calls = append(calls, call)
		}
		return true
	})
	return calls
}

func funcOf(t *testing.T, file, name string) *ast.FuncDecl {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range f.Decls {
		if fn, ok := d.(*ast.FuncDecl); ok && fn.Name.Name == name {
			return fn
		}
	}
	t.Fatalf("%s has no function %s", file, name)
	return nil
}

func stringOf(t *testing.T, e ast.Expr) string {
	t.Helper()
	lit, ok := e.(*ast.BasicLit)
	if !ok || lit.Kind != token.STRING {
		t.Fatalf("%v is not a string", e)
	}
	s, err := strconv.Unquote(lit.Value)
	if err != nil {
		t.Fatal(err)
	}
	return s
}
