package discovery

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"
)

func readDoc(t *testing.T, file string) string {
	t.Helper()
	raw, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return strings.ReplaceAll(string(raw), "\r\n", "\n")
}

// syntaxOf is the syntax in the doc comment of a source's parser, and words those that its parser knows.
func syntaxOf(t *testing.T, file string) (syntax string, words []string) {
	t.Helper()
	f, err := parser.ParseFile(token.NewFileSet(), file, nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	for _, decl := range f.Decls {
		fn, ok := decl.(*ast.FuncDecl)
		if !ok {
			continue
		}
		if fn.Name.Name == "UnmarshalCaddyfile" {
			for line := range strings.Lines(fn.Doc.Text()) {
				if code, ok := strings.CutPrefix(line, "\t"); ok {
					syntax += code
				}
			}
		}
		if !slices.Contains([]string{"UnmarshalCaddyfile", "dnsWord", "tls", "entry"}, fn.Name.Name) {
			continue
		}
		ast.Inspect(fn, func(n ast.Node) bool {
			c, ok := n.(*ast.CaseClause)
			if !ok {
				return true
			}
			for _, e := range c.List {
				if lit, ok := e.(*ast.BasicLit); ok && lit.Kind == token.STRING {
					word, err := strconv.Unquote(lit.Value)
					if err != nil {
						t.Fatal(err)
					}
					words = append(words, word)
				}
			}
			return true
		})
	}
	return syntax, words
}

// tabs indents with tabs, as a Caddyfile is.
func tabs(s string) string {
	return regexp.MustCompile(`(?m)^ +`).ReplaceAllStringFunc(s, func(in string) string { return strings.Repeat("\t", len(in)/4) })
}

// TestDocsSyntax: the syntax of each source on the docs page is that of its parser's comment, which has each word that the
// parser knows.
func TestDocsSyntax(t *testing.T) {
	page := readDoc(t, "../docs/discovery.md")
	_, dnsWords := syntaxOf(t, "lookup.go")
	dnsWords = slices.DeleteFunc(dnsWords, func(w string) bool { return w == "ipv4" || w == "ipv6" })
	for _, source := range []string{"a", "srv", "file", "http", "static", "multi", "reverse_proxy"} {
		syntax, words := syntaxOf(t, source+".go")
		if syntax == "" {
			t.Errorf("%s: no syntax in the comment", source)
		}
		if !strings.Contains(page, "```\n"+tabs(syntax)+"```\n") {
			t.Errorf("%s: docs/discovery.md lacks the syntax\n%s", source, syntax)
		}
		if source == "a" || source == "srv" {
			words = append(words, dnsWords...)
			if len(words) < 7 {
				t.Errorf("%s: only %v found", source, words)
			}
		}
		for _, word := range words {
			if !regexp.MustCompile(`(?m)^ +` + word + `\b`).MatchString(syntax) {
				t.Errorf("%s: the comment lacks the word %s", source, word)
			}
		}
	}
}

// TestDocsDefaults: the defaults on the docs page are the code's.
func TestDocsDefaults(t *testing.T) {
	page := readDoc(t, "../docs/discovery.md")
	_, http, _ := strings.Cut(page, "## `http`")
	for text, want := range map[string]time.Duration{
		page[strings.Index(page, "| `refresh` |"):]: defaultDNSRefresh,
		http[strings.Index(http, "| `refresh` |"):]: defaultHTTPRefresh,
		http[strings.Index(http, "| `timeout` |"):]: defaultHTTPTimeout,
	} {
		cell := strings.Trim(strings.Split(text, "|")[2], " `")
		if got, err := time.ParseDuration(cell); err != nil || got != want {
			t.Errorf("the page says %s; the default is %v", cell, want)
		}
	}
	if !strings.Contains(page, "looked at every `refresh` (`"+defaultFileRefresh.String()+"`)") {
		t.Error("file: the default of refresh is not on the page")
	}
}

// TestExampleList: the list in examples is one.
func TestExampleList(t *testing.T) {
	list, err := parseList([]byte(readDoc(t, "../examples/endpoints.yaml")), "", true)
	if err != nil || len(list) != 5 {
		t.Errorf("got %s, %v", text(list), err)
	}
	page := readDoc(t, "../docs/discovery.md")
	_, yaml, _ := strings.Cut(page, "```\n- address:")
	yaml, _, _ = strings.Cut(yaml, "```")
	if list, err := parseList([]byte("- address:"+yaml), "", true); err != nil || len(list) != 2 {
		t.Errorf("docs/discovery.md: got %s, %v", text(list), err)
	}
}
